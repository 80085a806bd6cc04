# SPDX-License-Identifier: Apache-2.0
"""The work behind the public calls: check, resolve, geometry, move."""
