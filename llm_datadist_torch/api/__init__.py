# SPDX-License-Identifier: Apache-2.0
"""What programs call, with its documentation."""
