//! `postern top`: what a daemon does, as it goes on.

use std::{
    io,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyEventKind};

use super::{
    Daemon,
    sample::{Interval, Sample},
    view::View,
};
use crate::{
    error::{Exit, Failure},
    stats::micros,
};

/// `postern top`.
#[derive(Args, Debug)]
pub struct TopArgs {
    /// The daemon's control socket
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Length of an interval
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub interval: u64,
    /// Print one interval and end
    #[arg(long)]
    pub once: bool,
    /// With --once: print it as JSON, beside what was counted since the daemon started
    #[arg(long, requires = "once")]
    pub json: bool,
}

/// Runs `postern top`.
///
/// # Errors
/// [`Exit::NoDaemon`]; [`Exit::Usage`] without a terminal.
pub fn run(args: &TopArgs) -> Result<(), Failure> {
    let mut daemon = Daemon::connect(&args.socket)?;
    let begun = Instant::now();
    let length = Duration::from_secs(args.interval);
    let at = |now: Instant| u64::try_from((now - begun).as_nanos()).unwrap_or(u64::MAX);
    let mut before = Sample::take(&mut daemon, at(Instant::now()))?;
    if args.once {
        std::thread::sleep(length);
        let after = Sample::take(&mut daemon, at(Instant::now()))?;
        let interval = Interval::between(&before, &after);
        if args.json {
            println!("{}", json(&after, &interval));
        } else {
            print!("{}", table(&interval));
        }
        return Ok(());
    }
    let no_terminal = |error: io::Error| {
        Failure::new(
            Exit::Usage,
            format_args!("this is no terminal to draw in ({error})"),
            "standard output",
            "use --once, or --once --json",
        )
    };
    let mut terminal = ratatui::try_init().map_err(no_terminal)?;
    let mut view = View::default();
    let ended = loop {
        if let Err(error) = terminal.draw(|frame| view.draw(frame)) {
            break Err(no_terminal(error));
        }
        match wait(&mut view, begun + Duration::from_nanos(before.at_ns) + length) {
            Ok(Waited::Pressed) => {}
            Ok(Waited::Enough) => match Sample::take(&mut daemon, at(Instant::now())) {
                Ok(after) => {
                    view.show(Interval::between(&before, &after));
                    before = after;
                }
                Err(failure) => break Err(failure),
            },
            Ok(Waited::Ended) => break Ok(()),
            Err(error) => break Err(no_terminal(error)),
        }
    };
    ratatui::restore();
    ended
}

/// What ended a wait.
enum Waited {
    /// A key, or another size.
    Pressed,
    /// The interval is over.
    Enough,
    /// A key that ends it all.
    Ended,
}

fn wait(view: &mut View, until: Instant) -> io::Result<Waited> {
    let left = until.saturating_duration_since(Instant::now());
    if !event::poll(left)? {
        return Ok(Waited::Enough);
    }
    Ok(match event::read()? {
        Event::Key(key) if key.kind == KeyEventKind::Press && !view.press(key) => Waited::Ended,
        _ => Waited::Pressed,
    })
}

/// An interval for a script, and all that was counted before.
fn json(sample: &Sample, interval: &Interval) -> serde_json::Value {
    let sessions = interval.sessions.iter().map(|(session, rate)| {
        serde_json::json!({
            "session": session.session,
            "process": session.process,
            "lanes": session.lanes,
            "files": session.files,
            "in_flight": session.in_flight,
            "requests": session.requests,
            "per_second": rate,
        })
    });
    serde_json::json!({
        "seconds": interval.seconds,
        "source": "daemon",
        "sessions": sessions.collect::<Vec<_>>(),
        "volumes": interval.volumes,
        "stages": interval.stages(None),
        "since_start": {
            "counters": sample.report.counters,
            "volumes": sample.volumes,
            "stages": Interval::between(&Sample::default(), sample).stages(None),
        },
    })
}

/// An interval as lines of text.
fn table(interval: &Interval) -> String {
    let mut text = format!(
        "{:<24} {:>9} {:>9} {:>10} {:>10} {:>8}\n",
        "volume", "IOPS", "MB/s", "p50 us", "p99 us", "errors"
    );
    for row in &interval.volumes {
        text += &format!(
            "{:<24} {:>9.0} {:>9.1} {:>10} {:>10} {:>8}\n",
            super::printable(&row.name),
            row.rate(),
            row.throughput() / 1e6,
            micros(row.p50_ns),
            micros(row.p99_ns),
            row.errors
        );
    }
    let claimed: Vec<_> = interval.volumes.iter().filter(|row| !row.claimed.is_empty()).collect();
    if !claimed.is_empty() {
        text += &format!(
            "\n{:<24} {:>11} {:>10} {:>10} {:>10} {:>8}\n",
            "claimed by enclaves", "checkpoints", "journal", "used", "free", "damaged"
        );
    }
    for row in claimed {
        text += &format!(
            "{:<24} {:>11} {:>10} {:>10} {:>10} {:>8}\n",
            super::printable(&row.name),
            row.claim("checkpoints"),
            row.claim("journal_blocks"),
            row.claim("used_blocks"),
            row.claim("free_blocks"),
            row.claim("integrity_failures")
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::sample::tests::recorded;

    #[test]
    fn a_script_gets_the_interval_and_what_was_before_it() {
        let (before, after) = (recorded(0, 10_000), recorded(1_000_000_000, 30_000));
        let interval = Interval::between(&before, &after);
        let json = json(&after, &interval);
        assert_eq!((&json["seconds"], &json["volumes"][0]["name"]), (&1.0.into(), &"fast".into()));
        assert_eq!(json["volumes"][0]["per_second"]["read"], 20_200.0);
        assert_eq!(json["sessions"][0]["per_second"], 20_000.0);
        assert_eq!(
            json["since_start"]["volumes"][0]["operations"]["read"]["outcomes"]["ok"],
            30_000
        );
        assert_eq!(json["since_start"]["stages"][0]["count"], 45_000);
        assert_eq!(json["stages"][0]["count"], 30_000);
        let table = table(&interval);
        let words: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(words, ["fast", "20200", "81.9", "20.0", "160.0", "200"]);
        let mut claimed = table.lines().skip_while(|line| !line.starts_with("claimed by"));
        let words: Vec<&str> = claimed.nth(1).unwrap().split_whitespace().collect();
        assert_eq!(words, ["fast", "1", "0", "0", "9", "2"]);
    }
}
