# SPDX-License-Identifier: Apache-2.0
"""Engines that can run MustDrop, a package each. Importing one imports its engine; importing this one imports none."""
