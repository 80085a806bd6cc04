# SPDX-License-Identifier: Apache-2.0
"""What moves bytes between two processes."""
