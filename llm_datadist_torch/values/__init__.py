# SPDX-License-Identifier: Apache-2.0
"""Values: enumerations, errors and self-checking descriptions. They do no I/O and start nothing."""
