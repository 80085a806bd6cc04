# SPDX-License-Identifier: Apache-2.0
"""``llm_datadist.v2``."""
