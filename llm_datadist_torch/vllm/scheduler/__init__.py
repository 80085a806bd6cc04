# SPDX-License-Identifier: Apache-2.0
"""The scheduler's half of the connector: which blocks are wanted, and which are kept."""
