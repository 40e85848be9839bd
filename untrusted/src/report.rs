//! Makes the statistics report: the probes' rows where there are probes, the daemon's own beside.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use crate::activation::Manager;
use crate::engine::Interface;
use crate::probes::Probes;
use crate::probes::kept::{NAME, TakenOver};
use crate::problem::log;
use crate::session::Sessions;
use crate::stats::{StageRow, StatsReport};
use crate::volumes::Names;

/// Where stage latencies come from.
#[derive(Debug)]
pub enum Source {
    /// The probes.
    Probes(Box<Probes>),
    /// The daemon's own clock, and why: what is missing and what to do.
    Daemon(String),
}

impl Source {
    /// Switches the probes on or off, where there are some; switched off, what they saw begin is
    /// recorded to its end. Answers when nothing of it is left, or after some seconds: a request may
    /// take longer, and counts as one that has not ended.
    pub async fn switch(&self, on: bool) {
        const PATIENCE: Duration = Duration::from_secs(2);
        const STEP: Duration = Duration::from_millis(5);
        let Self::Probes(probes) = self else { return };
        if on {
            return probes.switch_on();
        }
        probes.switch_off();
        let mut left = PATIENCE;
        while probes.under_way() > 0 && !left.is_zero() {
            tokio::time::sleep(STEP).await;
            left = left.saturating_sub(STEP);
        }
        probes.close();
    }

    /// Goes on with the probes of a daemon that died, if `kept` is what they are made of, or has
    /// some loaded for this process, which does its I/O by `interface`, unless `wanted` is false.
    /// `manager` keeps them for the next daemon. Also answers the names of the volumes that the
    /// probes know by number, and what of `kept` is of no use.
    #[must_use]
    pub fn load(
        wanted: bool,
        object: Option<&Path>,
        interface: Interface,
        manager: &Manager,
        kept: Vec<OwnedFd>,
    ) -> (Self, Names, Vec<OwnedFd>) {
        if wanted && let Some(found) = Probes::take_over(&kept, object, interface) {
            let TakenOver { mut probes, names, ledger } = found;
            probes.let_go();
            return (Self::Probes(Box::new(probes)), Names::noted(names, ledger), Vec::new());
        }
        if !kept.is_empty() {
            manager.forget(NAME);
        }
        if !wanted {
            let why = "probes are off; start posternd without --no-probes".to_owned();
            return (Self::Daemon(why), Names::default(), kept);
        }
        match Probes::start(object, interface) {
            Ok(mut probes) => {
                let ledger = probes.keep(manager, object, interface).unwrap_or_else(|e| {
                    let told = format_args!("the probes are not kept for the next daemon ({e})");
                    log(told, "who started this one", "it will load its own");
                    None
                });
                let names = ledger.map(|ledger| Names::noted(Vec::new(), ledger));
                probes.let_go();
                (Self::Probes(Box::new(probes)), names.unwrap_or_default(), kept)
            }
            Err(unavailable) => {
                log("no eBPF probes", &unavailable, "stages are taken by the daemon's own clock");
                (Self::Daemon(unavailable.to_string()), Names::default(), kept)
            }
        }
    }
}

/// The report as of now.
#[must_use]
pub fn report(sessions: &Sessions, source: &Source) -> StatsReport {
    let merged = sessions.hub().merged();
    let (daemon_stages, mut counters) = (merged.rows(), merged.counters);
    let each_session = sessions.rows();
    let (sessions, lanes) = sessions.counts();
    let (name, note, stages): (_, _, Vec<StageRow>) = match source {
        Source::Probes(probes) => {
            let named = probes.counters().into_iter();
            counters.extend(named.map(|(name, count)| (format!("probe_{name}"), count)));
            let notes = probes.notes().join("; ");
            let stages = if probes.is_on() { probes.rows() } else { daemon_stages.clone() };
            let name = if probes.is_on() { "ebpf" } else { "daemon" };
            (name, Some(notes).filter(|notes| !notes.is_empty()), stages)
        }
        Source::Daemon(why) => ("daemon", Some(why.clone()), daemon_stages.clone()),
    };
    StatsReport {
        source: name.to_owned(),
        source_note: note,
        stages,
        daemon_stages,
        counters,
        sessions,
        lanes,
        each_session,
    }
}
