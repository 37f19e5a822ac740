"""Paired benchmark of a plug-in against stock vLLM at its best static setting.

``workloads`` makes requests, ``server`` and ``load`` run vLLM's own server and load generator,
``metrics``, ``compare`` and ``capacity`` turn token times into figures, ``runner`` alternates the
variants, and ``report`` and ``plot`` write what a reader sees.
"""
