# SPDX-License-Identifier: Apache-2.0
"""Connections between instances: frames over stream sockets, served by one I/O thread."""
