# SPDX-License-Identifier: Apache-2.0
"""Does it keep the answers? Questions about pictures, the methods that compete, and how they are scored."""

FULL = "full"
"""The name of asking with all tokens."""
