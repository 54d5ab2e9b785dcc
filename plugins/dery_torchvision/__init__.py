"""The ``torchvision`` zoo and data sets. Importing this imports neither torchvision nor torch."""

from dery_torchvision.datasets import TorchvisionData
from dery_torchvision.zoo import TorchvisionZoo

zoo = TorchvisionZoo()
data = TorchvisionData()
