# SPDX-License-Identifier: Apache-2.0
"""``llm_datadist.metadef_wrapper``: a native module, of which nothing is needed here."""
