"""Attention modules, the latent cache and the transformers models that use them.

Import what you need from the modules: ``attention`` and ``trace`` are the readable ones,
``latent_attention``, ``cache`` and ``hf`` the ones that run.
"""
