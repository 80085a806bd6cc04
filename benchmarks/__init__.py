# SPDX-License-Identifier: Apache-2.0
"""Benchmarks. A wheel has those that ``python -m llm_datadist_torch bench`` runs (setup.py)."""
