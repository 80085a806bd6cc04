# SPDX-License-Identifier: Apache-2.0
"""What one instance owns: caches, their keys, leases and versions."""
