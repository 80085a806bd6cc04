# SPDX-License-Identifier: Apache-2.0
"""One module for each thing that differs between the versions of vLLM that are served.

Nothing else asks which version it is; these modules look for what they need, not for a number.
"""
