//! What the daemon counts, and the report it makes of it.
//!
//! Every lane writes its own [`LaneStats`] without locks; a report merges the living lanes with
//! what ended lanes left behind. Stages whose start or end lies in the enclave (`crossing_out`,
//! `crossing_in`) rest on stamps that the enclave claims: one that is missing, would make a stage
//! negative or never came is counted by its kind (together: `claims_refused`), not in the stage.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};

use crate::claims::{Claim, Claims, Told};
use crate::histogram::{Snapshot, bump, zeroed};
use crate::limits::SessionRow;
use crate::records::{RING, Record, Ring, Terms};
pub use crate::volumes::Stage;
use crate::volumes::{
    ByVolume, MOST_OF_LANE, Names, OPERATIONS, STAGES, VolumeStats, VolumeTotals,
};

/// Records that are kept of lanes that have ended.
const ENDED_RECORDS: usize = 4 * RING;

/// One stage of one operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageRow {
    /// Name of the stage.
    pub stage: String,
    /// `read`, `write`, `flush` or `discard`.
    pub operation: String,
    /// Number of requests seen.
    pub count: u64,
    /// Median, nanoseconds.
    pub p50_ns: u64,
    /// 99 of 100 requests took no longer, nanoseconds.
    pub p99_ns: u64,
    /// 999 of 1000 requests took no longer, nanoseconds.
    pub p999_ns: u64,
    /// The longest, nanoseconds.
    pub max_ns: u64,
    /// All together, nanoseconds.
    pub sum_ns: u64,
}

impl StageRow {
    /// The row of a histogram; `None` while it holds nothing.
    #[must_use]
    pub fn of(stage: &str, operation: &str, histogram: &Snapshot) -> Option<Self> {
        let count = histogram.count();
        (count > 0).then(|| Self {
            stage: stage.to_owned(),
            operation: operation.to_owned(),
            count,
            p50_ns: histogram.quantile(500),
            p99_ns: histogram.quantile(990),
            p999_ns: histogram.quantile(999),
            max_ns: histogram.max_ns,
            sum_ns: histogram.sum_ns,
        })
    }
}

/// What `postern_stats` and `--stats-file` answer, as JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatsReport {
    /// Where [`Self::stages`] comes from: `ebpf` or `daemon`.
    pub source: String,
    /// Why `source` is not `ebpf`, and what to do about it.
    pub source_note: Option<String>,
    /// Latency by stage and operation.
    pub stages: Vec<StageRow>,
    /// The daemon's own coarse stages; the same as [`Self::stages`] when `source` is `daemon`.
    pub daemon_stages: Vec<StageRow>,
    /// Events by name since the daemon started.
    pub counters: BTreeMap<String, u64>,
    /// Sessions now.
    pub sessions: u64,
    /// Lanes now.
    pub lanes: u64,
    /// What each session has and had, by number.
    #[serde(default)]
    pub each_session: Vec<SessionRow>,
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters of one lane. Only the lane's thread writes them.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: AtomicU64,)*
        }

        impl Counters {
            fn absorb(&self, other: &Self) {
                $(bump(&self.$name, other.$name.load(Relaxed));)*
            }

            fn name_all(&self, into: &mut BTreeMap<String, u64>) {
                $(*into.entry(stringify!($name).to_owned()).or_default() +=
                    self.$name.load(Relaxed);)*
            }
        }
    };
}

counters! {
    /// Descriptors taken from submission rings.
    submissions,
    /// Completions published.
    completions,
    /// io_submit calls that accepted something.
    batches,
    /// io_submit calls that the kernel answered with EAGAIN, or accepted only in part.
    submit_retries,
    /// Wake-ups by the enclave's doorbell.
    doorbells_received,
    /// Doorbells rung for a driver thread of the enclave.
    doorbells_driver,
    /// Doorbells rung for the service thread of the enclave.
    doorbells_service,
    /// Times a lane spun, waiting for work.
    spins,
    /// Times work came while a lane spun.
    spins_won,
    /// Times a lane went to sleep.
    sleeps,
    /// Flushes by fdatasync on a thread, because the file has no asynchronous one.
    flushes_on_thread,
    /// Flushes by fdatasync in the lane itself, because they are short and nothing else was in
    /// flight. The probes see only those that io_submit was asked for.
    flushes_here,
    /// Descriptors refused: malformed, or for a file that is not open.
    refused_descriptors,
    /// Requests without a claimed time of publication.
    claims_missing,
    /// Claimed times of publication that lie after the pickup.
    claims_negative,
    /// Requests whose delivery the enclave had not told, or not truly, when their index was used
    /// again.
    claims_undelivered,
    /// Completions by the kernel for an index that has nothing in flight.
    unmatched_completions,
    /// Lanes ended because their ring was broken.
    broken_rings,
}

/// Everything a lane counts.
#[derive(Debug, Default)]
pub struct LaneStats {
    session: u64,
    common: Arc<Common>,
    /// The first is for what has no place of its own.
    volumes: [OnceLock<LaneVolume>; MOST_OF_LANE + 1],
    /// Event counters.
    pub counters: Counters,
    /// Its last records.
    pub records: Ring,
}

/// What all lanes share.
#[derive(Debug, Default)]
struct Common {
    names: Names,
    terms: Terms,
}

#[derive(Debug)]
struct LaneVolume {
    number: u64,
    stats: Box<VolumeStats>,
}

impl LaneStats {
    /// The place in this lane of the volume called `name`; made if it is not there yet. Only the
    /// lane's thread may call this and what follows.
    pub fn place_of(&self, name: &str) -> usize {
        let number = self.common.names.number(name);
        let new = || LaneVolume { number, stats: zeroed() };
        let own = self.volumes.iter().enumerate().skip(1);
        let mut own = own.filter(|_| number != 0);
        let place = own.find(|(_, place)| place.get_or_init(new).number == number);
        place.map_or_else(
            || {
                self.volumes[0].get_or_init(|| LaneVolume { number: 0, stats: zeroed() });
                0
            },
            |(at, _)| at,
        )
    }

    /// The counts of the volume at a place that [`Self::place_of`] gave.
    #[inline]
    #[must_use]
    pub fn volume(&self, place: usize) -> Option<&VolumeStats> {
        Some(&self.volumes.get(place)?.get()?.stats)
    }

    /// The number of the volume at a place.
    #[inline]
    #[must_use]
    pub fn number_at(&self, place: usize) -> u64 {
        self.volumes.get(place).and_then(OnceLock::get).map_or(0, |volume| volume.number)
    }

    /// The session that the lane is of.
    #[inline]
    #[must_use]
    pub const fn session(&self) -> u64 {
        self.session
    }

    /// What is kept records of.
    #[inline]
    #[must_use]
    pub fn terms(&self) -> &Terms {
        &self.common.terms
    }

    /// Adds to a counter.
    #[inline]
    pub fn add(&self, which: impl Fn(&Counters) -> &AtomicU64, by: u64) {
        bump(which(&self.counters), by);
    }

    fn add_to(&self, into: &mut ByVolume) {
        for volume in self.volumes.iter().filter_map(OnceLock::get) {
            volume.stats.add_to(into.entry(volume.number).or_default());
        }
    }
}

/// The lanes that count, and what ended lanes counted.
#[derive(Debug, Default)]
pub struct StatsHub {
    inner: Mutex<Inner>,
    common: Arc<Common>,
    /// Connections refused before a lane was attached, by any reason.
    pub refused_connections: AtomicU64,
    /// What became of leases.
    pub leases: Arc<LeaseCounts>,
    /// What enclaves claim of their volumes.
    pub claims: Arc<Claims>,
}

/// What became of leases since the daemon started.
#[derive(Debug, Default)]
pub struct LeaseCounts {
    /// Granted.
    pub granted: AtomicU64,
    /// Times that a holder was asked for one.
    pub asked: AtomicU64,
    /// Times that a holder kept one although it was asked.
    pub kept: AtomicU64,
    /// Taken from a holder that did not answer.
    pub taken: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    living: Vec<Arc<LaneStats>>,
    ended: Ended,
    lanes_attached: u64,
    sessions_started: u64,
}

/// What ended lanes left behind.
#[derive(Debug, Default)]
struct Ended {
    counters: Counters,
    volumes: ByVolume,
    records: Vec<Record>,
}

/// The counts of all lanes, merged.
#[derive(Clone, Debug, Default)]
pub struct Merged {
    /// Events by name.
    pub counters: BTreeMap<String, u64>,
    /// By volume: its name, and what was counted.
    pub volumes: Vec<(String, VolumeTotals)>,
    /// By volume: its name, and what enclaves claim.
    pub claims: Vec<(String, Claim)>,
}

impl Merged {
    /// All volumes together.
    #[must_use]
    pub fn total(&self) -> VolumeTotals {
        let mut total = VolumeTotals::default();
        self.volumes.iter().for_each(|(_, volume)| total.absorb(volume));
        total
    }

    /// Latency by stage and operation, all volumes together.
    #[must_use]
    pub fn rows(&self) -> Vec<StageRow> {
        let (mut rows, total) = (Vec::new(), self.total());
        for (stage, operations) in STAGES.iter().zip(&total.stages) {
            for (name, histogram) in OPERATIONS.iter().zip(operations) {
                rows.extend(StageRow::of(stage, name, histogram));
            }
        }
        rows
    }
}

impl StatsHub {
    /// Nothing counted; volumes have these names and numbers.
    #[must_use]
    pub fn of(names: Names) -> Self {
        let common = Arc::new(Common { names, ..Common::default() });
        Self { common, ..Self::default() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counters for a new lane of `session`; `first` says that it starts it.
    pub fn lane(&self, session: u64, first: bool) -> Arc<LaneStats> {
        let common = Arc::clone(&self.common);
        let stats = Arc::new(LaneStats { session, common, ..LaneStats::default() });
        let mut inner = self.lock();
        inner.lanes_attached += 1;
        inner.sessions_started += u64::from(first);
        inner.living.push(Arc::clone(&stats));
        stats
    }

    /// Keeps what a lane counted; its thread must have ended.
    pub fn retire(&self, lane: &Arc<LaneStats>) {
        let mut inner = self.lock();
        let before = inner.living.len();
        inner.living.retain(|l| !Arc::ptr_eq(l, lane));
        if inner.living.len() < before {
            let ended = &mut inner.ended;
            ended.counters.absorb(&lane.counters);
            lane.add_to(&mut ended.volumes);
            lane.records.read(0, &mut ended.records);
            ended.records.sort_unstable_by_key(|record| record.number);
            let surplus = ended.records.len().saturating_sub(ENDED_RECORDS);
            ended.records.drain(..surplus);
        }
    }

    /// What is kept records of.
    #[must_use]
    pub fn terms(&self) -> &Terms {
        &self.common.terms
    }

    /// The records with a number above `after`, in the order of their numbers.
    #[must_use]
    pub fn records(&self, after: u64) -> Vec<Record> {
        let inner = self.lock();
        let ended = &inner.ended.records;
        let from = ended.partition_point(|record| record.number <= after);
        let mut records = ended[from..].to_vec();
        let living = inner.living.clone();
        drop(inner);
        for lane in living {
            lane.records.read(after, &mut records);
        }
        records.sort_unstable_by_key(|record| record.number);
        // A lane may have ended in between.
        records.dedup_by_key(|record| record.number);
        records
    }

    /// Room for what an enclave claims of a file of the volume `name`.
    #[must_use]
    pub fn told(&self, name: &str) -> Told {
        Told::new(Arc::clone(&self.claims), self.common.names.number(name))
    }

    /// The name of a volume by its number.
    #[must_use]
    pub fn name(&self, number: u64) -> String {
        self.common.names.name(number)
    }

    /// What all lanes have counted, by number of the volume.
    #[must_use]
    pub fn by_volume(&self) -> ByVolume {
        let inner = self.lock();
        let mut volumes = inner.ended.volumes.clone();
        // Of some only the daemon before knew more than the name.
        for number in 1..=self.common.names.count() {
            volumes.entry(number).or_default();
        }
        for lane in &inner.living {
            lane.add_to(&mut volumes);
        }
        volumes
    }

    /// What all lanes have counted.
    #[must_use]
    pub fn merged(&self) -> Merged {
        let inner = self.lock();
        let total = Counters::default();
        total.absorb(&inner.ended.counters);
        let mut volumes = inner.ended.volumes.clone();
        for lane in &inner.living {
            total.absorb(&lane.counters);
            lane.add_to(&mut volumes);
        }
        let mut counters = BTreeMap::new();
        total.name_all(&mut counters);
        counters.insert("lanes_attached".to_owned(), inner.lanes_attached);
        counters.insert("sessions_started".to_owned(), inner.sessions_started);
        drop(inner);
        let named = volumes.into_iter().map(|(number, totals)| (self.name(number), totals));
        let claims =
            self.claims.all().into_iter().map(|(number, claim)| (self.name(number), claim));
        let mut merged = Merged { counters, volumes: named.collect(), claims: claims.collect() };
        let sum = merged.total();
        let claims = ["claims_missing", "claims_negative", "claims_undelivered"];
        let claims: u64 = claims.iter().map(|name| merged.counters[*name]).sum();
        let overflows = sum.stages.iter().flatten().map(|histogram| histogram.overflows).sum();
        for (name, count) in [
            ("refused_connections", self.refused_connections.load(Relaxed)),
            ("leases_granted", self.leases.granted.load(Relaxed)),
            ("leases_asked", self.leases.asked.load(Relaxed)),
            ("leases_kept", self.leases.kept.load(Relaxed)),
            ("leases_taken", self.leases.taken.load(Relaxed)),
            ("bytes_read", sum.bytes[0]),
            ("bytes_written", sum.bytes[1]),
            ("flushes", sum.succeeded(2)),
            ("discards", sum.succeeded(3)),
            ("errors", sum.failed()),
            ("claims_refused", claims),
            ("stage_overflows", overflows),
            ("records_kept", self.terms().last()),
        ] {
            merged.counters.insert(name.to_owned(), count);
        }
        merged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ended_lane_still_counts_in_the_report_and_its_volume() {
        let hub = StatsHub::default();
        let (one, two) = (hub.lane(1, true), hub.lane(1, false));
        let place = one.place_of("a");
        one.volume(place).unwrap().record(Stage::Device, 1, 1_000);
        assert_eq!((two.place_of("b"), two.place_of("a"), two.place_of("b")), (1, 2, 1));
        two.volume(2).unwrap().record(Stage::Device, 1, 3_000);
        two.volume(1).unwrap().record(Stage::Device, 77, 1);
        two.add(|c| &c.submissions, 5);
        hub.retire(&two);
        hub.retire(&two);
        let merged = hub.merged();
        let rows = merged.rows();
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].stage.as_str(), rows[0].operation.as_str()), ("device", "read"));
        assert_eq!((rows[0].count, rows[0].sum_ns, rows[0].max_ns), (2, 4_000, 3_000));
        let counters = &merged.counters;
        assert_eq!((counters["submissions"], counters["lanes_attached"]), (5, 2));
        let names: Vec<_> = merged.volumes.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
    }

    #[test]
    fn a_lane_with_many_volumes_counts_the_further_ones_as_others() {
        let hub = StatsHub::default();
        let lane = hub.lane(1, true);
        let places: Vec<_> = (0..12).map(|n| lane.place_of(&format!("v{n}"))).collect();
        assert_eq!(places, [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0]);
        for place in places {
            lane.volume(place).unwrap().begin();
        }
        let merged = hub.merged();
        let begun: Vec<_> = merged.volumes.iter().map(|(_, totals)| totals.begun).collect();
        assert_eq!(begun, [4, 1, 1, 1, 1, 1, 1, 1, 1]);
        assert_eq!(merged.volumes[0].0, crate::volumes::OTHERS);
    }

    #[test]
    fn the_report_survives_its_own_json() {
        let report = StatsReport {
            source: "daemon".into(),
            source_note: Some("no CAP_BPF; run with more".into()),
            stages: vec![StageRow { stage: "device".into(), count: 3, ..StageRow::default() }],
            counters: BTreeMap::from([("errors".to_owned(), u64::MAX)]),
            ..StatsReport::default()
        };
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<StatsReport>(&json).unwrap(), report);
    }
}
