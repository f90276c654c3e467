"""Importing anything of the suite makes its surroundings plain first."""

import os

from tests.surroundings import let_children_hear, make_plain

make_plain(os.environ)
let_children_hear()
