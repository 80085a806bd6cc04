# SPDX-License-Identifier: Apache-2.0
"""For programs that say ``import llm_datadist``: the reference's modules (docs/migrating.md)."""
