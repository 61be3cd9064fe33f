"""Has Hydra search this project's configurations, wherever it is installed or worked in.

There is no `__init__.py` beside this file: `hydra_plugins` is a package that projects share.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class MyProject(SearchPathPlugin):
    """Adds `my_project/conf` behind the program's own files."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append it."""
        search_path.append(provider="my_project", path="pkg://my_project.conf")
