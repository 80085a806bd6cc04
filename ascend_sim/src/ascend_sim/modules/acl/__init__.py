# SPDX-License-Identifier: Apache-2.0
"""``import acl`` for whoever has this directory on ``sys.path``: the part of pyACL that is used.

Only the simulator of the Ascend runtime puts it there.
"""

from . import rt as rt
