# SPDX-License-Identifier: Apache-2.0
"""The worker's half of the connector: it moves blocks, and answers peers."""
