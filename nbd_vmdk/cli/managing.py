"""Options of the verbs that change whole images: resize, compact, rename, clone, delete."""

import click

dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would be done.")
drop_ctk_option = click.option(
    "--drop-ctk", is_flag=True, help="Write although changes are tracked, and end the tracking."
)
allow_dir_option = click.option(
    "--allow-dir",
    "allow_dirs",
    type=click.Path(),
    metavar="DIR",
    multiple=True,
    help="Let images name files in DIR, and look for relatives there too.  May be repeated.",
)
