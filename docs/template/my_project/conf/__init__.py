"""Configurations, beside gaccum_exp's; this file lets Hydra find them as `pkg://my_project.conf`."""
