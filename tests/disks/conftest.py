"""The server of a test is the plugin's tests' own."""

from tests.plugin.conftest import serve

nbdkit = serve
