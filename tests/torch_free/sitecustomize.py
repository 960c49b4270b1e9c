"""Python reads this at start where this folder is on PYTHONPATH: there is no torch.

So commands that tests start run as users have them, who need no torch, and begin seconds sooner.
"""

import sys

sys.modules["torch"] = None
