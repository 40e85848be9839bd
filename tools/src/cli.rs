//! The command line, and its refusals in one line.

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum, error::ErrorKind};

use crate::{
    counter::{AccessArgs, CounterArgs, MovesArg},
    error::{Exit, Failure},
    observe::{report::ReportArgs, top::TopArgs, trace::TraceArgs},
    size,
};

const EXIT_CODES: &str = "\
Exit codes (of `run`, when the program ran: the program's own, or 128 + signal):
   0  done                            70  a fault of Postern or its installation
  64  the command line is wrong       72  no room on the host
  65  the volume is damaged           73  the volume is in use
  66  no such volume                  74  the host failed to read or write
  67  no key, or not this volume's    77  the host refuses access
  68  no direct I/O on the host      126  the program cannot be run inside
  69  the daemon is not there        127  no such program
  75  the counter does not answer     76  not the volume's newest state";

const RUN_EXAMPLES: &str = "\
Examples:
  Make a 1 GiB volume and let fio write to it and verify what it wrote:
    postern run --volume /sealed/data=/srv/data.vol --create 1G -- \\
      fio --name=t --filename=/sealed/data --ioengine=libaio --direct=1 \\
          --rw=randrw --bs=4k --iodepth=32 --size=1g --verify=crc32c

  A protected directory for a program that makes its own files:
    postern run --volume /data/=/srv/data --create 1G -- sh -c 'cd /data && mydatabase init'

  The same volume again, with a key of one's own and the latency of every stage saved:
    postern run --volume /sealed/data=/srv/data.vol --key-file /etc/postern/data.key \\
      --stats stages.json -- mydatabase --datafile /sealed/data";

const TRACE_EXAMPLES: &str = "\
Without options: the slowest request of each second and lane, each that failed, and one in 1024.
Examples:
  All requests on a volume that take a millisecond or more:
    postern trace --socket /run/postern/control --volume data --min-latency 1ms
  Ten seconds of one in 16, for ui.perfetto.dev:
    postern trace --socket /run/postern/control --one-in 16 --duration 10 --perfetto trace.json";

const COUNTER_EXAMPLES: &str = "\
Example, after putting back a copy of a volume:
  postern counter reset /srv/data.vol --key-file K --counter etcd:https://c:2379/postern/data";

/// Native AIO on sealed volumes for unmodified programs inside an enclave.
///
/// A volume is one host file of sealed 4 KiB blocks. The program sees it as a plain file; the host
/// sees neither a key nor a plaintext byte.
#[derive(Debug, Parser)]
#[command(name = "postern", version, after_help = EXIT_CODES, after_long_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Wait this long for a volume that another program has; it is asked to hand it over
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 10)]
    pub wait: u32,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a program with sealed volumes under the paths it opens
    #[command(after_help = RUN_EXAMPLES, after_long_help = format!("{RUN_EXAMPLES}\n\n{EXIT_CODES}"))]
    Run(RunArgs),
    /// Make a volume in a new host file
    #[command(
        after_help = "Example:\n  postern format /srv/data.vol --size 64G --key-file /etc/postern/data.key"
    )]
    Format(FormatArgs),
    /// Show what a volume is: size, state, journal
    Info(VolumeArgs),
    /// Read and authenticate everything in a volume; report each damaged range. Never writes
    #[command(after_help = "Exit code 0: whole. 65: damage, each range on a line of its own.")]
    Verify(VolumeArgs),
    /// Grow or shrink a volume
    #[command(
        after_help = "Example:\n  postern resize /srv/data.vol --size 128G\n\nData beyond the new size \
                      is in the way of a shrink: it is refused, and nothing changes."
    )]
    Resize(ResizeArgs),
    /// Keep, list, delete or copy states of a volume. A running program is asked for it and goes on
    /// afterwards: what it had written by then is in the snapshot
    Snapshot(SnapshotArgs),
    /// Who can open a volume: list, add, change and remove keys
    #[command(subcommand)]
    Key(KeyCommand),
    /// Seal a whole volume anew under a new volume key, so that keys it dropped open nothing of it
    #[command(
        after_help = "Offline. Cut off at any point (kill -9, power), the volume works as before; run it again\n\
                      and it goes on. Ciphertext that the host kept stays readable with the old key. A\n\
                      volume with snapshots is refused: delete them first."
    )]
    Rekey(RekeyArgs),
    /// Latency per stage of a running daemon
    Stats(StatsArgs),
    /// The eBPF probes of a running daemon: what they cost; switch them on or off
    #[command(
        after_help = "Switched off, the probes stay loaded and end with their first look; what they recorded stays.\n\
                      What they saw begin is recorded to its end. Times of `runs` need kernel.bpf_stats_enabled=1."
    )]
    Probes(ProbesArgs),
    /// SGX enclave images: look at one, sign it, run it
    #[command(after_help = crate::enclave::EXAMPLES)]
    Enclave {
        /// What to do.
        #[command(subcommand)]
        command: crate::enclave::EnclaveCommand,
    },
    /// Watch a running daemon: volumes, sessions, percentiles by stage, latency over time
    #[command(
        after_help = "Keys: q quit, s sort, r reverse, / filter, up and down choose a volume, Tab sessions, p pause."
    )]
    Top(TopArgs),
    /// Print a line for each request of a running daemon that is slow, failed or of a sample
    #[command(after_help = TRACE_EXAMPLES)]
    Trace(TraceArgs),
    /// Watch a running daemon and write what it did as one HTML file, with pictures, for a ticket
    #[command(
        after_help = "Example:\n  postern report --socket /run/postern/control --duration 60s --output slow.html\n\n\
                      The file has names of volumes, offsets, lengths and times in it; no content."
    )]
    Report(ReportArgs),
    /// Monotonic counters, which tell an old state of a volume from the newest
    #[command(after_help = COUNTER_EXAMPLES)]
    Counter {
        /// What to do.
        #[command(subcommand)]
        command: CounterCommand,
    },
}

/// `postern counter`.
#[derive(Debug, Subcommand)]
pub enum CounterCommand {
    /// Show what a counter holds
    Show(CounterShowArgs),
    /// Take a volume as it is for the newest, whatever the counter holds: after restoring a copy,
    /// or to bind a volume that was made without a counter
    Reset(CounterResetArgs),
}

/// `postern counter show`.
#[derive(Args, Debug)]
pub struct CounterShowArgs {
    /// file:PATH, or etcd:URL[,URL...]/KEY
    pub counter: OsString,
    /// How etcd is reached.
    #[command(flatten)]
    pub access: AccessArgs,
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}

/// `postern counter reset`.
#[derive(Args, Debug)]
pub struct CounterResetArgs {
    /// The host file of the volume, or the host directory of a protected directory
    pub host_file: PathBuf,
    /// The counter: file:PATH, or etcd:URL[,URL...]/KEY
    #[arg(long, value_name = "COUNTER", required_unless_present = "none", conflicts_with = "none")]
    pub counter: Option<OsString>,
    /// Bind the volume to no counter any more
    #[arg(long)]
    pub none: bool,
    /// How etcd is reached.
    #[command(flatten)]
    pub access: AccessArgs,
    /// Key of the volume; without it HOST_FILE.key
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// A passphrase in its place
    #[command(flatten)]
    pub passphrase: PassphraseArgs,
    /// Go on through the page cache where the host file system does no direct I/O
    #[arg(long)]
    pub allow_buffered: bool,
}

/// Where a passphrase comes from, in place of a key file.
#[derive(Args, Debug, Default)]
pub struct PassphraseArgs {
    /// Ask for a passphrase on the terminal, in place of a key file
    #[arg(long, conflicts_with_all = ["key_file", "passphrase_file"])]
    pub passphrase: bool,
    /// Passphrase: what FILE holds, without the newline at its end; `-` reads standard input,
    /// /dev/fd/N an open descriptor
    #[arg(long, value_name = "FILE", conflicts_with = "key_file")]
    pub passphrase_file: Option<PathBuf>,
}

/// `postern key`.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Show the slots in use. Takes no key: this much anybody can see who can read the host file
    List(KeyListArgs),
    /// Put another key into a free slot
    Add(KeyAddArgs),
    /// Put a new key in place of the one that is given
    Change(KeyAddArgs),
    /// Empty a slot. Who kept a copy of the header and the slot's key opens that copy still: only
    /// `postern rekey` makes a key worthless
    Remove(KeyRemoveArgs),
}

/// `postern key list`.
#[derive(Args, Debug)]
pub struct KeyListArgs {
    /// The host file of the volume, or the host directory of a protected directory
    pub host_file: PathBuf,
    /// Go on through the page cache where the host file system does no direct I/O
    #[arg(long)]
    pub allow_buffered: bool,
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}

/// `postern key add` and `postern key change`.
#[derive(Args, Debug)]
pub struct KeyAddArgs {
    /// The volume and a key that opens it
    #[command(flatten)]
    pub volume: VolumeArgs,
    /// The new key: a file with 32 bytes or 64 hexadecimal digits
    #[arg(long, value_name = "FILE", required_unless_present_any = ["new_passphrase", "new_passphrase_file"])]
    pub new_key_file: Option<PathBuf>,
    /// The new key is a passphrase, asked for twice on the terminal
    #[arg(long, conflicts_with_all = ["new_key_file", "new_passphrase_file"])]
    pub new_passphrase: bool,
    /// The new key is the passphrase in FILE, as with --passphrase-file
    #[arg(long, value_name = "FILE", conflicts_with = "new_key_file")]
    pub new_passphrase_file: Option<PathBuf>,
}

/// `postern key remove`.
#[derive(Args, Debug)]
pub struct KeyRemoveArgs {
    /// The volume and a key that opens it
    #[command(flatten)]
    pub volume: VolumeArgs,
    /// The slot to empty, as `postern key list` numbers them; without it the slot of the given key
    #[arg(long, value_name = "NUMBER")]
    pub slot: Option<usize>,
    /// Empty the slot even if it is the last one: nobody can ever open the volume again
    #[arg(long)]
    pub destroy_volume: bool,
}

/// `postern rekey`.
#[derive(Args, Debug)]
pub struct RekeyArgs {
    /// The volume and a key that opens it, before and after
    #[command(flatten)]
    pub volume: VolumeArgs,
    /// Keep the slot of this key too; may be repeated. Slots whose key is not given are emptied
    #[arg(long, value_name = "FILE")]
    pub keep_key_file: Vec<PathBuf>,
    /// Keep the slot of the passphrase in FILE too; may be repeated
    #[arg(long, value_name = "FILE")]
    pub keep_passphrase_file: Vec<PathBuf>,
}

/// `postern run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// The program sees the volume in HOST_FILE under the absolute path GUEST_PATH; may be repeated.
    /// With a slash at the end of GUEST_PATH it sees a directory, and HOST_FILE is one: each file
    /// made there is a volume of its own
    #[arg(long, value_name = "GUEST_PATH=HOST_FILE", required_unless_present = "volume_ro")]
    pub volume: Vec<OsString>,
    /// As --volume, but the program can only read it, at the same time as others that only read
    #[arg(long, value_name = "GUEST_PATH=HOST_FILE")]
    pub volume_ro: Vec<OsString>,
    /// Keep the volumes while the program has them open, whoever asks for them
    #[arg(long)]
    pub exclusive: bool,
    /// Most bytes that a file made in a protected directory can have (K, M, G, T)
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "16G")]
    pub file_capacity: u64,
    /// Key of the volumes: 32 bytes, or 64 hexadecimal digits. Without it a development key beside
    /// each volume is used, HOST_FILE.key
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// A passphrase in its place
    #[command(flatten)]
    pub passphrase: PassphraseArgs,
    /// Make volumes that do not exist, SIZE bytes each (K, M, G, T: powers of 1024); directories
    /// are made empty
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub create: Option<u64>,
    /// Use the daemon that listens here and start none; HOST_FILE is then the daemon's name for it
    #[arg(long, value_name = "PATH", conflicts_with_all = ["create", "allow_buffered", "no_probes", "passphrase", "passphrase_file"], requires = "key_file")]
    pub socket: Option<PathBuf>,
    /// Have requests wait this long for another daemon when theirs has died; then they fail with EIO.
    /// A run's own daemon is started again at once; 0: not at all
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub daemon_wait: u32,
    /// Counters of the volumes.
    #[command(flatten)]
    pub counter: CounterArgs,
    /// How often the counter moves: the more often, the less a rollback can take back unnoticed
    #[arg(long, value_name = "WHEN", value_enum, default_value_t)]
    pub counter_moves: MovesArg,
    /// Save the daemon's statistics (JSON) when the program has ended
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,
    /// Save what the daemon says (its standard error)
    #[arg(long, value_name = "FILE", conflicts_with = "socket")]
    pub daemon_log: Option<PathBuf>,
    /// Memory for the maps of all volumes together (K, M, G): a read whose part of the map is not
    /// in it costs one more host read, or two
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "64M")]
    pub cache: u64,
    /// Give space that becomes free back to the host's file system. Without this option only
    /// protected directories do: in a volume the next writes are faster into space that it keeps
    #[arg(long, value_name = "WHETHER", value_enum)]
    pub discard: Option<DiscardArg>,
    /// Go on through the page cache where the host file system does no direct I/O
    #[arg(long)]
    pub allow_buffered: bool,
    /// What the run's daemon lets the program take; may be repeated: lanes=N (processes at work on
    /// protected files at once), memory=SIZE, files=N, depth=N, inflight=SIZE, iops=N, bandwidth=SIZE
    /// (in a second). `posternd --help` has more on each --session-LIMIT
    #[arg(long, value_name = "LIMIT=VALUE", value_parser = limit, conflicts_with = "socket")]
    pub limit: Vec<(&'static str, String)>,
    /// The kernel's interface that the run's daemon uses for host I/O. The probes follow libaio only
    #[arg(long, value_name = "ENGINE", value_enum, default_value_t, conflicts_with = "socket")]
    pub engine: EngineArg,
    /// Load no eBPF probes; stages are then timed by the daemon's own clock
    #[arg(long)]
    pub no_probes: bool,
    /// Let the program and its children change nothing on the host's file systems, whatever they
    /// try: what they write goes to the volumes, to standard output and to what --allow-write names
    #[arg(long, group = "sealed_off")]
    pub no_host_writes: bool,
    /// With --no-host-writes or --no-host-files: let the program write to PATH and what is beneath; may be repeated
    #[arg(long, value_name = "PATH", requires = "sealed_off")]
    pub allow_write: Vec<PathBuf>,
    /// As --no-host-writes; and let the program and its children read no host file either, but for
    /// what a program needs to start (its own file, libraries, /proc) and what --let-read names
    #[arg(long, group = "sealed_off")]
    pub no_host_files: bool,
    /// With --no-host-files: let the program read, list and run PATH and what is beneath; may be
    /// repeated
    #[arg(long, value_name = "PATH", requires = "no_host_files")]
    pub let_read: Vec<PathBuf>,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    pub program: Vec<OsString>,
}

/// The kernel's interface for host I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum EngineArg {
    /// io_submit(2).
    #[default]
    Libaio,
    /// io_uring(7).
    #[value(name = "io_uring")]
    Uring,
}

/// Limits of a session, and the daemon's option for each.
const LIMITS: [(&str, &str); 7] = [
    ("lanes", "--session-lanes"),
    ("memory", "--session-memory"),
    ("files", "--session-files"),
    ("depth", "--session-depth"),
    ("inflight", "--session-inflight"),
    ("iops", "--session-iops"),
    ("bandwidth", "--session-bandwidth"),
];

/// Reads `LIMIT=VALUE`; the daemon's option and its value. The value is the daemon's to judge.
fn limit(text: &str) -> Result<(&'static str, String), String> {
    let (name, value) = text.split_once('=').ok_or("write LIMIT=VALUE")?;
    let known = LIMITS.into_iter().find(|(known, _)| *known == name);
    let digits = value.starts_with(|first: char| matches!(first, '1'..='9'));
    match known {
        Some((_, option)) if digits => Ok((option, value.to_owned())),
        Some(_) => Err("its value is a number above 0".to_owned()),
        None => {
            Err("the limits are lanes, memory, files, depth, inflight, iops, bandwidth".to_owned())
        }
    }
}

/// `--discard`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DiscardArg {
    /// In volumes and protected directories
    On,
    /// Nowhere
    Off,
}

impl DiscardArg {
    /// Whether a volume, or a protected directory, gives space back.
    #[must_use]
    pub fn applies(given: Option<Self>, directory: bool) -> bool {
        given.map_or(directory, |given| given == Self::On)
    }
}

/// `postern format`.
#[derive(Args, Debug)]
pub struct FormatArgs {
    /// The host file to make; it must not exist or be empty
    pub host_file: PathBuf,
    /// Bytes that the guest may store (K, M, G, T: powers of 1024)
    #[arg(long, value_parser = size::parse)]
    pub size: u64,
    /// Key: 32 bytes, or 64 hexadecimal digits. Without it a development key HOST_FILE.key is made
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// A passphrase in its place
    #[command(flatten)]
    pub passphrase: PassphraseArgs,
    /// Counter of the volume.
    #[command(flatten)]
    pub counter: CounterArgs,
    /// Go on through the page cache where the host file system does no direct I/O
    #[arg(long)]
    pub allow_buffered: bool,
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}

/// `postern info` and `postern verify`.
#[derive(Args, Debug)]
pub struct VolumeArgs {
    /// The host file of the volume, or the host directory of a protected directory
    pub host_file: PathBuf,
    /// Key of the volume; without it HOST_FILE.key
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// A passphrase in its place
    #[command(flatten)]
    pub passphrase: PassphraseArgs,
    /// Counter of the volume.
    #[command(flatten)]
    pub counter: CounterArgs,
    /// Go on through the page cache where the host file system does no direct I/O
    #[arg(long)]
    pub allow_buffered: bool,
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}

/// `postern resize`.
#[derive(Args, Debug)]
pub struct ResizeArgs {
    /// The volume
    #[command(flatten)]
    pub volume: VolumeArgs,
    /// Bytes that the guest may store from now on (K, M, G, T: powers of 1024)
    #[arg(long, value_parser = size::parse)]
    pub size: u64,
}

/// `postern snapshot`.
#[derive(Args, Debug)]
pub struct SnapshotArgs {
    /// What to do
    #[command(subcommand)]
    pub command: SnapshotCommand,
}

/// The commands of `postern snapshot`.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Keep the volume as it is now; costs no more than what is overwritten later
    Create(SnapshotName),
    /// List the snapshots, oldest first
    List(VolumeArgs),
    /// Let a snapshot go, with all that only it holds
    Delete(SnapshotName),
    /// Write a snapshot into a new volume, or as plain text into a new file
    Export(ExportArgs),
}

/// `postern snapshot create` and `postern snapshot delete`.
#[derive(Args, Debug)]
pub struct SnapshotName {
    /// The volume
    #[command(flatten)]
    pub volume: VolumeArgs,
    /// Name of the snapshot: 1 to 48 printable ASCII characters without blanks
    pub name: String,
}

/// `postern snapshot export`.
#[derive(Args, Debug)]
pub struct ExportArgs {
    /// Which snapshot
    #[command(flatten)]
    pub snapshot: SnapshotName,
    /// The file to make; it must not exist or be empty
    pub output: PathBuf,
    /// Key of the new volume; without it a development key OUTPUT.key is made
    #[arg(long, value_name = "FILE", conflicts_with = "plain")]
    pub output_key_file: Option<PathBuf>,
    /// Write what the guest sees, readable by whoever can read the file (mode 0600)
    #[arg(long)]
    pub plain: bool,
}

/// `postern probes`.
#[derive(Args, Debug)]
pub struct ProbesArgs {
    /// Switch them; without it they are only shown
    #[arg(value_name = "on|off")]
    pub switch: Option<Switch>,
    /// The daemon's control socket
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// `postern stats`.
#[derive(Args, Debug)]
pub struct StatsArgs {
    /// The daemon's control socket
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Print the daemon's JSON as it is
    #[arg(long)]
    pub json: bool,
}

/// Reads the command line. `Ok(None)`: help or the version was printed.
///
/// # Errors
/// [`Exit::Usage`] with the first thing that is wrong.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Cli>, Failure> {
    let error = match Cli::try_parse_from(arguments) {
        Ok(cli) => return Ok(Some(cli)),
        Err(error) => error,
    };
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A reader that has gone away needs no help.
            let _ = error.print();
            Ok(None)
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            Err(Failure::new(Exit::Usage, "no command", "postern", "see `postern --help`"))
        }
        _ => Err(Failure::new(Exit::Usage, first_line(&error), "command line", help_for(&error))),
    }
}

/// The first paragraph of clap's message as one line, without its `error:`.
fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let paragraph: Vec<&str> =
        text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let line = paragraph.join(" ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

/// Which help to read: clap names the command in its usage line.
fn help_for(error: &clap::Error) -> String {
    let text = error.to_string();
    let command = [
        "run",
        "format",
        "info",
        "verify",
        "resize",
        "snapshot create",
        "snapshot list",
        "snapshot delete",
        "snapshot export",
        "snapshot",
        "key list",
        "key add",
        "key change",
        "key remove",
        "key",
        "rekey",
        "stats",
        "report",
        "enclave inspect",
        "enclave sign",
        "enclave run",
        "enclave",
        "counter show",
        "counter reset",
        "counter",
    ]
    .into_iter()
    .find(|name| text.contains(&format!("Usage: postern {name}")));
    command.map_or_else(
        || "see `postern --help`".to_owned(),
        |name| format!("see `postern {name} --help`"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Result<Option<Cli>, Failure> {
        parse(std::iter::once("postern").chain(line.split_whitespace()).map(OsString::from))
    }

    #[test]
    fn the_definition_is_sound() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn what_follows_the_dashes_belongs_to_the_program() {
        let cli = of("run --volume /a=b --create 1G -- fio --size=1g -- x").unwrap().unwrap();
        let Command::Run(run) = cli.command else { panic!("not run") };
        assert_eq!(run.program, ["fio", "--size=1g", "--", "x"]);
        assert_eq!(run.create, Some(1 << 30));
    }

    #[test]
    fn each_refusal_is_one_line_with_exit_code_64() {
        for line in [
            "",
            "frobnicate",
            "run",
            "run --volume /a=b",
            "run --volume /a=b --create 1X -- true",
            "run --volume /a=b --socket s -- true",
            "run --volume /a=b --key-file k --socket s --create 1G -- true",
            "run --volume /a=b true",
            "format v",
            "format v --size 0",
            "info",
            "resize v",
            "resize v --size 5",
            "snapshot create v",
            "snapshot export v s o --plain --output-key-file k",
            "stats",
            "info v --key-file k --passphrase",
            "run --volume /a=b --passphrase-file p --socket s -- true",
            "key",
            "key add v --key-file k",
            "key add v --new-passphrase --new-key-file k",
            "rekey",
            "counter",
            "counter reset v",
            "counter reset v --none --counter file:c",
            "report",
            "report --socket s --duration 5",
        ] {
            let failure = of(line).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage, "{line}");
            assert!(!failure.to_string().contains('\n'), "{failure}");
            assert!(failure.to_string().contains("--help`"), "{failure}");
        }
    }
}
