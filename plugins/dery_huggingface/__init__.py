"""Hugging Face data sets. Importing this does not import ``datasets``, which is an extra."""

from dery_huggingface.sets import HuggingFaceData

data = HuggingFaceData()
