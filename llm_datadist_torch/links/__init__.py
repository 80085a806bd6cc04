# SPDX-License-Identifier: Apache-2.0
"""Who we are linked with: sockets, messages, links, and the answers to peers."""
