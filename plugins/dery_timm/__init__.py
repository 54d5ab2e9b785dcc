"""The ``timm`` zoo: ``timm/NAME[.TAG]``. Importing this imports neither timm nor torch."""

from dery_timm.zoo import TimmZoo

zoo = TimmZoo()
