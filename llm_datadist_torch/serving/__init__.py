# SPDX-License-Identifier: Apache-2.0
"""What an owner does for its peers: resolve, lease, relay, serve claims."""
