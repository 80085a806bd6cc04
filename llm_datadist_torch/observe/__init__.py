# SPDX-License-Identifier: Apache-2.0
"""Seeing what an instance does: counters, metrics, traces, pictures.

``transfers.py`` counts, and is the only part that transfers call. The rest reads what it counted.
"""
