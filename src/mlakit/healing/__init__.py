"""Healing: training what a conversion changed, against the original."""
