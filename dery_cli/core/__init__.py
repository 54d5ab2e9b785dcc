"""The paper (Deep Model Reassembly, NeurIPS 2022) as pure functions.

In reading order: ``dissect`` (a model as a path of blocks, section 3.1), ``features``,
``similarity`` (Definition 3), ``partition`` (Eq. 2-5), ``assemble`` (Eq. 8-11), ``joints``,
``stitch`` and ``network`` (the assembled network), ``proxies`` (training-free scores).
"""
