// SPDX-License-Identifier: Apache-2.0
// Libraries that torch_npu, or an extension for it, is linked with, and of which it needs nothing
// but that they are there. build.py has their names.
