# SPDX-License-Identifier: Apache-2.0
"""Where cache memory comes from, and whether given memory is what it is said to be."""
