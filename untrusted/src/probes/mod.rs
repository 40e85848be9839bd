//! Loads the eBPF probes and reads what they found out.
//!
//! The probes see every request of one process from the kernel's side: io_submit, the block layer's
//! completion, io_getevents; or what io_uring has in their place. What they record, and what a stage means, stands in
//! [`postern_ebpf_common`].
//!
//! Loading takes privileges that serving does not need: [`Probes::start`] has a process of its own
//! do it, which ends before the first enclave connects ([`mod@loader`]).
//!
//! Holds: the kernel removes the programs when [`Probes`] is dropped or the process dies, unless
//! somebody keeps them for the next one ([`mod@kept`]); without
//! probes the daemon works the same, with times of its own. Does not hold: that every kernel can
//! tell when the device was done; [`Probes::notes`] says when it can not.

mod btf;
mod error;
mod gate;
pub mod kept;
mod kernel;
pub mod loader;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::maps::{Array, Map, MapData, MapError, PerCpuArray};
use aya::programs::{BtfTracePoint, ProgramError, TracePoint};
use aya::{Btf, Ebpf, EbpfError, EbpfLoader};
use postern_ebpf_common::counter::{COUNTERS, Counter, NAMES, WRITERS};
use postern_ebpf_common::histogram::{HISTOGRAM_WORDS, Histogram, highest, quantile};
use postern_ebpf_common::{OPERATIONS, SERIES, STAGES, VOLUMES, config, series, stage};

use crate::engine::{Interface, now_ns};
use crate::histogram::Snapshot;
use crate::stats::StageRow;
pub use error::ProbesUnavailable;
use gate::Gate;

/// Environment variable with the path of the object.
pub const OBJECT_VARIABLE: &str = "POSTERN_PROBES";
/// File name of the object, looked for beside the executable.
pub const OBJECT_NAME: &str = "postern-probes.o";

/// Probes of system calls: program, tracepoint.
type SystemCall = (&'static str, &'static str);
/// Those of native AIO.
const AIO: [SystemCall; 3] = [
    ("exit_io_getevents", "sys_exit_io_getevents"),
    ("exit_io_submit", "sys_exit_io_submit"),
    ("enter_io_submit", "sys_enter_io_submit"),
];
const PGETEVENTS: SystemCall = ("exit_io_pgetevents", "sys_exit_io_pgetevents");
/// Those of io_uring; [`URING_COMPLETE`] comes first.
const URING: [SystemCall; 2] = [
    ("exit_io_uring_enter", "sys_exit_io_uring_enter"),
    ("enter_io_uring_enter", "sys_enter_io_uring_enter"),
];
/// Program and tracepoint of io_uring's completions: argument, and its type.
const URING_COMPLETE: (&str, usize, &str) = ("io_uring_complete", 0, "io_ring_ctx");
/// Probes of the block layer (program and tracepoint have one name): argument that leads to the bio,
/// and its type.
const BLOCK_LAYER: [(&str, usize, &str); 2] =
    [("block_rq_complete", 0, "request"), ("block_bio_complete", 1, "bio")];

/// The maps that are read, by their names in the object.
const HISTOGRAMS: &str = "HISTOGRAMS";
const COUNTERS_MAP: &str = "COUNTERS";
const GATE_MAP: &str = "GATE";
const TARGET_MAP: &str = "TARGET";
/// All of these, in the order in which they are handed over.
const MAPS: [&str; 4] = [HISTOGRAMS, COUNTERS_MAP, GATE_MAP, TARGET_MAP];

/// Counted beside what the programs count: requests that were in flight when their daemon died.
pub const ABANDONED: &str = "abandoned";

/// Most memory that the histograms of all volumes take on all processors together, bytes. One volume
/// has some in any case.
const HISTOGRAM_MEMORY: u64 = 32 << 20;

const TRACEFS: &str = "/sys/kernel/tracing";

/// Running probes. Dropping them detaches and unloads them.
pub struct Probes {
    histograms: PerCpuArray<MapData, [u64; HISTOGRAM_WORDS]>,
    counters: PerCpuArray<MapData, [u64; COUNTERS]>,
    /// Until it is let go.
    target: Option<Array<MapData, u64>>,
    gate: Gate,
    notes: Vec<String>,
    /// To be handed over; then they are let go.
    maps: Vec<OwnedFd>,
    programs: Vec<(String, OwnedFd)>,
    /// What keeps the programs attached.
    attached: Attached,
}

/// Dropped, it detaches.
enum Attached {
    Here { _ebpf: Box<Ebpf> },
    Elsewhere { links: Vec<OwnedFd> },
}

/// What one probe costs, as far as the kernel counts it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProgramCost {
    /// Name of the program.
    pub name: String,
    /// The kernel's number for it.
    pub id: u64,
    /// Times it ran; 0 unless the sysctl `kernel.bpf_stats_enabled` is set.
    pub runs: u64,
    /// Nanoseconds all runs took; 0 unless that sysctl is set.
    pub run_ns: u64,
    /// Times it was left out because it was already running on that CPU.
    pub missed: u64,
    /// Instructions the kernel's verifier looked at.
    pub verified_instructions: u64,
}

impl Probes {
    /// Loads the probes and attaches them to the process `tgid` (a number in the caller's process-id
    /// namespace), which does its I/O by `interface`.
    ///
    /// The object is `object`, else `$POSTERN_PROBES`, else `postern-probes.o` beside the
    /// executable. tracefs is mounted at its usual place if it is not, and stays mounted.
    ///
    /// # Errors
    /// Why the probes can not run; what the block layer's probes lack is only a note.
    pub fn load(
        object: Option<&Path>,
        tgid: u32,
        interface: Interface,
    ) -> Result<Self, ProbesUnavailable> {
        let path = object_path(object)?;
        let bytes = std::fs::read(&path).map_err(|error| ProbesUnavailable::Object {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        let mut notes = Vec::new();
        let types = btf::KernelTypes::of_this_kernel()
            .map_err(|reason| ProbesUnavailable::NoTypes { reason })?;
        provide_tracefs(&mut notes)?;

        let mut words = [0; config::WORDS];
        kernel::set_namespace(&mut words);
        kernel::set_arguments(&mut words, &types)
            .map_err(|what| ProbesUnavailable::Kernel { what })?;
        if interface == Interface::Uring {
            kernel::set_uring(&mut words, &types).map_err(not_followed)?;
        }
        let device = kernel::set_device(&mut words, &types);
        let volumes = volumes_for(aya::util::nr_cpus().map_or(1, |cpus| cpus as u64));
        words[config::Config::Volumes as usize] = volumes;

        let mut ebpf = EbpfLoader::new()
            .btf(None)
            .map_max_entries(HISTOGRAMS, u32::try_from(volumes * SERIES).unwrap_or(u32::MAX))
            .override_global(config::SYMBOL, &words[..], true)
            .load(&bytes)
            .map_err(|error| refused_object(&path, &error))?;
        let maps: Option<Vec<OwnedFd>> = MAPS
            .iter()
            .map(|name| match ebpf.map(name) {
                Some(Map::PerCpuArray(data) | Map::Array(data)) => {
                    data.fd().as_fd().try_clone_to_owned().ok()
                }
                _ => None,
            })
            .collect();
        let maps = maps.ok_or_else(|| ProbesUnavailable::Object {
            path: path.clone(),
            reason: "its maps can not be used".to_owned(),
        })?;
        let mut target: Array<_, u64> = map(&mut ebpf, TARGET_MAP, &path)?;
        target.set(0, u64::from(tgid), 0).map_err(|e| refused("which process is traced", &e))?;
        match interface {
            Interface::Libaio => {
                for (program, tracepoint) in AIO {
                    attach_system_call(&mut ebpf, program, tracepoint)?;
                }
                let (program, tracepoint) = PGETEVENTS;
                if let Err(error) = attach_system_call(&mut ebpf, program, tracepoint) {
                    notes.push(format!("io_pgetevents is not traced: {error}"));
                }
            }
            Interface::Uring => {
                attach_uring(&mut ebpf, &types)?;
                for (program, tracepoint) in URING {
                    attach_system_call(&mut ebpf, program, tracepoint)?;
                }
            }
        }
        match device {
            Ok(()) => attach_block_layer(&mut ebpf, &types, &mut notes),
            Err(reason) => notes.push(no_device(&reason)),
        }
        let at = MAPS.iter().position(|name| *name == GATE_MAP);
        let gate = at.map(|at| Gate::of(maps[at].as_fd()));
        let gate = gate.and_then(Result::ok).ok_or_else(|| ProbesUnavailable::Object {
            path: path.clone(),
            reason: format!("its map {GATE_MAP} can not be used"),
        })?;
        let histograms = map(&mut ebpf, HISTOGRAMS, &path)?;
        let counters = map(&mut ebpf, COUNTERS_MAP, &path)?;
        let programs = ebpf
            .programs()
            .filter_map(|(name, program)| {
                let fd = program.fd().ok()?.as_fd().try_clone_to_owned().ok()?;
                Some((name.to_owned(), fd))
            })
            .collect();
        let (target, attached) = (Some(target), Attached::Here { _ebpf: Box::new(ebpf) });
        Ok(Self { histograms, counters, target, gate, notes, maps, programs, attached })
    }

    /// Looks at the requests of the process `tgid` from now on; whether it does.
    fn follow(&mut self, tgid: u32) -> bool {
        let set = self.target.as_mut().map(|target| target.set(0, u64::from(tgid), 0));
        matches!(set, Some(Ok(())))
    }

    /// Closes what only setting up takes. From now on this process can not turn the probes to
    /// others, nor can anybody whom it gives descriptors.
    pub fn let_go(&mut self) {
        self.target = None;
        self.maps.clear();
    }

    fn links(&self) -> &[OwnedFd] {
        match &self.attached {
            Attached::Here { .. } => &[],
            Attached::Elsewhere { links } => links,
        }
    }

    /// Latency by stage and operation since the probes were loaded, all volumes together, in the
    /// order of a request's way. Combinations that did not occur are left out.
    #[must_use]
    pub fn rows(&self) -> Vec<StageRow> {
        let mut all: BTreeMap<u64, Sums> = BTreeMap::new();
        self.each(|_, series, sums| {
            let Sums { sum_ns, max_ns, buckets } = sums;
            match all.entry(series) {
                Entry::Vacant(place) => drop(place.insert(Sums { sum_ns, max_ns, buckets })),
                Entry::Occupied(mut place) => {
                    let total = place.get_mut();
                    total.sum_ns = total.sum_ns.wrapping_add(sum_ns);
                    total.max_ns = total.max_ns.max(max_ns);
                    total.buckets.iter_mut().zip(buckets).for_each(|(total, n)| *total += n);
                }
            }
        });
        all.iter().filter_map(|(series, sums)| sums.row(*series)).collect()
    }

    /// The histogram of each volume (its number; 0: others together), stage and operation, in the
    /// order of a request's way; without those that are empty.
    #[must_use]
    pub fn latency(&self) -> Vec<(u64, &'static str, &'static str, Snapshot)> {
        let mut all = Vec::new();
        self.each(|volume, series, sums| {
            let Some((stage, operation)) = names_of(series) else { return };
            let mut snapshot = Snapshot::default();
            (snapshot.sum_ns, snapshot.max_ns) = (sums.sum_ns, sums.max_ns);
            for (bucket, &count) in (0..).zip(&sums.buckets).filter(|(_, count)| **count > 0) {
                snapshot.add(highest(bucket), count);
            }
            all.push((volume, stage, operation, snapshot));
        });
        all
    }

    /// Volumes that have histograms of their own: those with a number below this, above 0.
    #[must_use]
    pub fn volumes(&self) -> u64 {
        u64::from(self.histograms.len()) / SERIES
    }

    /// Gives `to` every histogram that is not empty: volume, series, what is in it.
    fn each(&self, mut to: impl FnMut(u64, u64, Sums)) {
        for volume in 0..self.volumes() {
            let read = |series: u64| self.histogram(volume * SERIES + series);
            // Every request that is recorded is recorded there.
            let seen = (1..OPERATIONS.len() as u64).map(|op| series(stage::HOST_SUBMIT, op));
            if !seen.clone().any(|series| read(series).is_some()) {
                continue;
            }
            for series in 0..SERIES {
                if let Some(sums) = read(series) {
                    to(volume, series, sums);
                }
            }
        }
    }

    /// A histogram of all processors together; `None` while it is empty.
    fn histogram(&self, at: u64) -> Option<Sums> {
        let each_cpu = self.histograms.get(&u32::try_from(at).ok()?, 0).ok()?;
        let mut sums = Sums { sum_ns: 0, max_ns: 0, buckets: vec![0; HISTOGRAM_WORDS - 2] };
        for [sum, max, rest @ ..] in each_cpu.iter() {
            sums.sum_ns = sums.sum_ns.wrapping_add(*sum);
            sums.max_ns = sums.max_ns.max(*max);
            for (total, n) in sums.buckets.iter_mut().zip(rest) {
                *total += n;
            }
        }
        (sums.buckets.iter().any(|n| *n > 0)).then_some(sums)
    }

    /// Whether new requests are looked at.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.gate.is_open()
    }

    /// Looks at new requests again; what was recorded before stays.
    pub fn switch_on(&self) {
        self.gate.open(now_ns());
    }

    /// Looks at no new requests any more. Those that are under way are recorded as usual: call
    /// [`Self::close`] when [`Self::under_way`] says that there are none, or after a while.
    pub fn switch_off(&self) {
        self.gate.begin_to_close();
    }

    /// Looks at nothing any more, unless it was switched on again.
    pub fn close(&self) {
        self.gate.close();
    }

    /// Requests that were seen and have not ended, as far as the probes know.
    #[must_use]
    pub fn under_way(&self) -> u64 {
        let counters = self.totals();
        let of = |counter: Counter| counters[counter as usize];
        let rows = self.rows();
        let ended = rows.iter().filter(|row| row.stage == STAGES[stage::HOST_SUBMIT as usize]);
        let ended = ended.map(|row| row.count).sum::<u64>();
        let gone = of(Counter::NotAccepted) + of(Counter::Overwritten) + self.gate.abandoned();
        of(Counter::Seen).saturating_sub(gone + ended)
    }

    /// What was counted instead of recorded, by name; also the requests seen and, for each program
    /// that missed a run, `missed_PROGRAM`.
    #[must_use]
    pub fn counters(&self) -> BTreeMap<String, u64> {
        let totals = self.totals();
        let mut named: BTreeMap<String, u64> =
            NAMES.iter().map(|name| (*name).to_owned()).zip(totals).collect();
        named.insert(ABANDONED.to_owned(), self.gate.abandoned());
        for cost in self.costs() {
            named.insert(format!("missed_{}", cost.name), cost.missed);
        }
        named
    }

    /// The counters, of all writers and processors together.
    fn totals(&self) -> [u64; COUNTERS] {
        let mut totals = [0u64; COUNTERS];
        for writer in 0..WRITERS {
            // The kernel answers every index below the map's size.
            let Ok(each_cpu) = self.counters.get(&writer, 0) else { continue };
            for cpu in each_cpu.iter() {
                for (total, n) in totals.iter_mut().zip(cpu) {
                    *total += n;
                }
            }
        }
        totals
    }

    /// What an operator should know to read the numbers: what could not be attached and what follows
    /// from it. Empty when everything runs as it should.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let mut notes = self.notes.clone();
        if !self.is_on() {
            notes.push(
                "the probes are switched off; `postern probes on` switches them on".to_owned(),
            );
        }
        let rows = self.rows();
        let on_device = |stage: u64| {
            let rows = rows.iter().filter(|row| {
                row.stage == STAGES[stage as usize] && row.operation != OPERATIONS[3]
            });
            rows.map(|row| row.count).sum::<u64>()
        };
        let (all, known) = (on_device(stage::DEVICE), on_device(stage::REAP));
        if !self.traces_device() {
            return notes;
        }
        if all > 0 && known == 0 {
            notes.push(no_device(
                "no completion in the block layer could be led back to a request; \
                 the file system may keep its own records, or serve all from memory",
            ));
        } else if all > known {
            let unknown = all - known;
            notes.push(format!(
                "when the device was done is not known of {unknown} of {all} reads and writes (page \
                 cache, holes, what a file system does by itself): their `device` contains `reap`",
            ));
        }
        notes
    }

    /// Whether a probe of the block layer runs.
    #[must_use]
    pub fn traces_device(&self) -> bool {
        BLOCK_LAYER.iter().any(|(name, ..)| self.programs.iter().any(|(loaded, _)| loaded == name))
    }

    /// What each attached program costs, by name.
    #[must_use]
    pub fn costs(&self) -> Vec<ProgramCost> {
        let mut costs: Vec<_> = self
            .programs
            .iter()
            .filter_map(|(name, program)| {
                let fd = program.as_raw_fd();
                let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
                Some(cost_of(name, &info))
            })
            .collect();
        costs.sort_by(|a, b| a.name.cmp(&b.name));
        costs
    }
}

/// What a histogram holds.
struct Sums {
    sum_ns: u64,
    max_ns: u64,
    buckets: Vec<u64>,
}

impl Sums {
    fn row(&self, series: u64) -> Option<StageRow> {
        let (stage, operation) = names_of(series)?;
        let Self { sum_ns, max_ns, buckets } = self;
        Some(StageRow {
            stage: stage.to_owned(),
            operation: operation.to_owned(),
            count: buckets.iter().sum(),
            p50_ns: quantile(buckets, *max_ns, 500),
            p99_ns: quantile(buckets, *max_ns, 990),
            p999_ns: quantile(buckets, *max_ns, 999),
            max_ns: *max_ns,
            sum_ns: *sum_ns,
        })
    }
}

/// Stage and operation of a series.
fn names_of(number: u64) -> Option<(&'static str, &'static str)> {
    let stages = (0..).zip(STAGES);
    let mut all = stages.flat_map(|stage| (1..).zip(&OPERATIONS[1..]).map(move |op| (stage, op)));
    all.find(|((stage, _), (op, _))| series(*stage, *op) == number)
        .map(|((_, stage), (_, operation))| (stage, *operation))
}

/// For how many volumes there is memory on `cpus` processors, the others' together included.
const fn volumes_for(cpus: u64) -> u64 {
    let each = SERIES * size_of::<Histogram>() as u64 * if cpus == 0 { 1 } else { cpus };
    let fit = HISTOGRAM_MEMORY / each;
    if fit == 0 {
        1
    } else if fit > VOLUMES {
        VOLUMES
    } else {
        fit
    }
}

fn not_followed(reason: String) -> ProbesUnavailable {
    ProbesUnavailable::Kernel {
        what: format!(
            "what it takes to follow io_uring ({reason}; --engine libaio can be followed)"
        ),
    }
}

impl std::fmt::Debug for Probes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Probes").field("notes", &self.notes).finish_non_exhaustive()
    }
}

/// Follows `bpf_prog_show_fdinfo` in Linux kernel/bpf/syscall.c: `name:\tnumber` lines.
fn cost_of(name: &str, fdinfo: &str) -> ProgramCost {
    let field = |wanted: &str| {
        let value =
            |line: &str| line.split_once(":\t").filter(|(n, _)| *n == wanted)?.1.parse().ok();
        fdinfo.lines().find_map(value).unwrap_or(0)
    };
    ProgramCost {
        name: name.to_owned(),
        id: field("prog_id"),
        runs: field("run_cnt"),
        run_ns: field("run_time_ns"),
        missed: field("recursion_misses"),
        verified_instructions: field("verified_insns"),
    }
}

fn no_device(reason: &str) -> String {
    format!("device times are not exact, stage `device` contains `reap`: {reason}")
}

fn object_path(given: Option<&Path>) -> Result<PathBuf, ProbesUnavailable> {
    if let Some(path) = given {
        return Ok(path.to_owned());
    }
    if let Some(path) = std::env::var_os(OBJECT_VARIABLE) {
        return Ok(path.into());
    }
    let beside = std::env::current_exe().map(|exe| exe.with_file_name(OBJECT_NAME));
    beside.map_err(|error| ProbesUnavailable::Object {
        path: OBJECT_NAME.into(),
        reason: format!("where this program lies is not known: {error}"),
    })
}

/// Sees that the tracepoints' file system is mounted.
fn provide_tracefs(notes: &mut Vec<String>) -> Result<(), ProbesUnavailable> {
    let places = [TRACEFS, "/sys/kernel/debug/tracing"].map(|p| Path::new(p).join("events"));
    let mounted = || places.iter().any(|events| events.exists());
    if mounted() {
        return Ok(());
    }
    if let Err(error) = places[0].try_exists()
        && error.kind() == std::io::ErrorKind::PermissionDenied
    {
        return Err(ProbesUnavailable::NotPermitted { what: format!("reading {TRACEFS}") });
    }
    // SAFETY: all three are constant strings that end in a zero; tracefs takes no data.
    let result = unsafe {
        libc::mount(
            c"tracefs".as_ptr(),
            c"/sys/kernel/tracing".as_ptr(),
            c"tracefs".as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
            std::ptr::null(),
        )
    };
    let reason = std::io::Error::last_os_error();
    if mounted() {
        if result == 0 {
            notes.push(format!("mounted tracefs at {TRACEFS}"));
        }
        return Ok(());
    }
    Err(ProbesUnavailable::NoTracefs { reason })
}

fn attach_system_call(
    ebpf: &mut Ebpf,
    program: &str,
    tracepoint: &str,
) -> Result<(), ProbesUnavailable> {
    let attach = |ebpf: &mut Ebpf| {
        let found: &mut TracePoint =
            ebpf.program_mut(program).ok_or(ProgramError::NotLoaded)?.try_into()?;
        found.load()?;
        found.attach("syscalls", tracepoint).map(drop)
    };
    attach(ebpf).map_err(|error| match error {
        ProgramError::TracePointError(_) if os_error(&error) == Some(libc::EACCES) => {
            ProbesUnavailable::NotPermitted { what: format!("reading the tracepoint {tracepoint}") }
        }
        ProgramError::TracePointError(_) => ProbesUnavailable::Kernel {
            what: format!("the tracepoint {tracepoint} ({})", chain(&error)),
        },
        other => refused(&format!("the program {program}"), &other),
    })
}

fn attach_uring(ebpf: &mut Ebpf, types: &btf::KernelTypes) -> Result<(), ProbesUnavailable> {
    let (name, argument, pointee) = URING_COMPLETE;
    if !types.tracepoint_takes(name, argument, pointee) {
        return Err(not_followed(format!("it has no such tracepoint as {name}")));
    }
    let refused = |error: &(dyn std::error::Error + 'static)| {
        self::refused(&format!("the program {name}"), error)
    };
    let btf = Btf::from_sys_fs().map_err(|error| refused(&error))?;
    attach_btf(ebpf, name, &btf).map_err(|error| refused(&error))
}

fn attach_btf(ebpf: &mut Ebpf, name: &str, btf: &Btf) -> Result<(), ProgramError> {
    let program: &mut BtfTracePoint =
        ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into()?;
    program.load(name, btf)?;
    program.attach().map(drop)
}

/// Attaches what can be attached of the block layer's probes; says in `notes` what can not.
fn attach_block_layer(ebpf: &mut Ebpf, types: &btf::KernelTypes, notes: &mut Vec<String>) {
    let btf = match Btf::from_sys_fs() {
        Ok(btf) => btf,
        Err(error) => return notes.push(no_device(&chain(&error))),
    };
    let mut attached = 0;
    for (name, argument, pointee) in BLOCK_LAYER {
        if !types.tracepoint_takes(name, argument, pointee) {
            notes.push(format!("{name} is not traced: this kernel has no such tracepoint"));
        } else if let Err(error) = attach_btf(ebpf, name, &btf) {
            let error = refused(&format!("the program {name}"), &error);
            notes.push(format!("{name} is not traced: {error}"));
        } else {
            attached += 1;
        }
    }
    if attached == 0 {
        notes.push(no_device("no probe of the block layer could be attached"));
    }
}

fn map<M: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &str,
    path: &Path,
) -> Result<M, ProbesUnavailable> {
    let unusable = |reason: String| ProbesUnavailable::Object { path: path.to_owned(), reason };
    let map = ebpf.take_map(name).ok_or_else(|| unusable(format!("it has no map {name}")))?;
    map.try_into().map_err(|error: MapError| unusable(format!("{name}: {error}")))
}

fn refused_object(path: &Path, error: &EbpfError) -> ProbesUnavailable {
    match error {
        EbpfError::MapError(_) | EbpfError::ProgramError(_) => refused("the probes' maps", error),
        _ => ProbesUnavailable::Object { path: path.to_owned(), reason: chain(error) },
    }
}

/// EPERM is for want of privileges; EACCES is how the verifier refuses.
fn refused(what: &str, error: &(dyn std::error::Error + 'static)) -> ProbesUnavailable {
    if os_error(error) == Some(libc::EPERM) {
        return ProbesUnavailable::NotPermitted { what: what.to_owned() };
    }
    ProbesUnavailable::Refused { what: format!("{what} ({})", chain(error)) }
}

/// The system's error number at the root of an error.
fn os_error(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let this = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
    this.or_else(|| error.source().and_then(os_error))
}

/// An error and its causes in one line, of a long verifier log the end.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    const MOST: usize = 400;
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(this) = cause {
        // Some errors tell their cause themselves.
        let more = this.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = this.source();
    }
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().rev().nth(MOST) {
        Some((at, _)) => format!("... {}", &line[at..]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_take_no_more_memory_than_is_theirs_and_one_volume_always_has_some() {
        let each = SERIES * 8 * HISTOGRAM_WORDS as u64;
        for cpus in [0, 1, 2, 15, 64, 256, 1 << 20] {
            let volumes = volumes_for(cpus);
            assert!((1..=VOLUMES).contains(&volumes), "{cpus}");
            assert!(volumes == 1 || volumes * each * cpus <= HISTOGRAM_MEMORY, "{cpus}");
        }
        assert_eq!((volumes_for(2), volumes_for(1 << 20)), (VOLUMES, 1));
    }

    #[test]
    fn a_series_has_the_names_of_its_stage_and_operation() {
        assert_eq!(names_of(series(stage::REAP, 2)), Some(("reap", "write")));
        assert_eq!(names_of(SERIES), None);
    }

    #[test]
    fn a_missing_object_is_named_with_its_remedy() {
        let path = Path::new("/nowhere/postern-probes.o");
        let error = Probes::load(Some(path), 1, Interface::Libaio).unwrap_err();
        assert!(matches!(&error, ProbesUnavailable::Object { path: p, .. } if p == path));
        let text = error.to_string();
        assert!(text.contains("/nowhere/postern-probes.o"), "{text}");
        assert!(text.contains("cargo xtask build"), "{text}");
        assert!(!text.contains('\n'), "{text}");
    }

    /// The text is what Linux 6.18 prints.
    #[test]
    fn costs_are_read_from_the_kernels_own_account() {
        let info = "pos:\t0\nflags:\t02000002\nprog_type:\t5\nprog_id:\t4\nrun_time_ns:\t1234\nrun_cnt:\t56\n\
                    recursion_misses:\t7\nverified_insns:\t890\n";
        let cost = cost_of("enter", info);
        assert_eq!((cost.id, cost.runs, cost.run_ns), (4, 56, 1234));
        assert_eq!((cost.missed, cost.verified_instructions), (7, 890));
        assert_eq!(cost_of("old", "pos:\t0\n").missed, 0);
    }

    #[test]
    fn a_refusal_keeps_the_end_of_a_long_explanation_in_one_line() {
        let long = format!("{}\nthe last line", "instruction\n".repeat(1000));
        let text = refused("the program x", &std::io::Error::other(long)).to_string();
        assert!(text.contains("the last line"), "{text}");
        assert!(!text.contains('\n') && text.len() < 800, "{text}");
    }

    #[test]
    fn want_of_privileges_is_told_from_a_refusal_by_the_verifier() {
        let denied = std::io::Error::from_raw_os_error(libc::EPERM);
        assert!(matches!(refused("a map", &denied), ProbesUnavailable::NotPermitted { .. }));
        let other = std::io::Error::from_raw_os_error(libc::EACCES);
        assert!(matches!(refused("a program", &other), ProbesUnavailable::Refused { .. }));
    }
}
