# SPDX-License-Identifier: Apache-2.0
"""Integrations, a package per engine. Importing one imports its engine; importing this package imports none."""
