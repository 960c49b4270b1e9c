"""Python reads this at start where this folder is on PYTHONPATH: it finds no torch.

So commands that tests start run as users have them, who need no torch, and begin seconds sooner.
"""

import sys
from importlib.machinery import PathFinder


class TorchFree(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "torch" else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = TorchFree
