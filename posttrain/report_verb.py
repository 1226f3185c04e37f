"""The verb `posttrain report`.

    posttrain report runs/tiny [--against runs/other] [--price 2.50] [--picture chain.svg]

In: command-line arguments. Out: report.html in the run's folder, the gains on the terminal, with --against what
differs from another run, with --picture the chain as an SVG file.
"""

import argparse
from pathlib import Path

from posttrain.errors import UserError


def add_verb(verbs, debug: argparse.ArgumentParser) -> None:
    """The verb and its flags."""
    report = verbs.add_parser("report", parents=[debug], help="write report.html of a run again and print the gains")
    report.set_defaults(call=call)
    report.add_argument("run", metavar="RUN", help="folder of a run, e.g. runs/tiny")
    report.add_argument("--against", metavar="RUN", help="another run: what differs in settings, data and figures")
    report.add_argument("--price", type=float, metavar="DOLLARS", help="of a device-hour: shows what each stage cost")
    report.add_argument("--picture", metavar="FILE", help="write the chain as an SVG file, too")


def call(options: argparse.Namespace) -> int:
    """Write and print. UserError for a run that cannot be read, a price below 0, a picture that is no .svg."""
    from posttrain import report, report_diff, report_read

    run = Path(options.run)
    if options.price is not None and not 0 <= options.price < float("inf"):
        raise UserError(f"--price: found {options.price}, expected dollars of a device-hour, such as 2.50")
    if options.picture is not None and not options.picture.endswith(".svg"):
        raise UserError(f"--picture: found {options.picture!r}, expected the name of an SVG file, such as chain.svg")
    against = None if options.against is None else Path(options.against)
    path = report.write_report(run, against=against, price=options.price)
    print(report.gains_table(run))
    if against is not None:
        print("\n" + "\n".join(report_diff.lines(report.difference(run, report_read.read_run(run)[1], against))))
    if options.picture is not None:
        print(f"\npicture  {report.write_picture(run, Path(options.picture))}")
    print(f"\nreport  {path}")
    return 0
