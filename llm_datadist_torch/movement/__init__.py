# SPDX-License-Identifier: Apache-2.0
"""Moving bytes between caches: one class per operation, each with its checks and its plan."""
