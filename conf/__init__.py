"""The program's configurations, for other projects to compose: `pkg://gaccum_exp.conf`."""
