//! `postern counter`: look at a counter, take a volume for the newest on purpose.

use std::path::Path;

use postern_trusted::{
    directory::INDEX_NAME,
    errno::Errno,
    exec::run_to_end,
    volume::{OpenOptions, SlotKey, Volume},
};
use serde_json::json;

use super::{Source, text_of};
use crate::{
    cli::{CounterCommand, CounterResetArgs, CounterShowArgs},
    disk::{Access, FileDisk},
    error::{Exit, Failure},
    key, volume,
};

/// Runs `postern counter`.
///
/// # Errors
/// [`Exit::NoCounter`], and those of opening the volume.
pub fn command(command: &CounterCommand) -> Result<(), Failure> {
    match command {
        CounterCommand::Show(args) => show(args),
        CounterCommand::Reset(args) => reset(args),
    }
}

fn show(args: &CounterShowArgs) -> Result<(), Failure> {
    let held = Source::parse(&args.counter, &args.access)?.look()?;
    if args.json {
        let sequence = held.map(|record| record.sequence);
        println!("{}", json!({ "sequence": sequence, "record": held.map(|r| text_of(&r)) }));
    } else if let Some(record) = held {
        println!("{}", text_of(&record));
    } else {
        println!("nothing yet");
    }
    Ok(())
}

fn reset(args: &CounterResetArgs) -> Result<(), Failure> {
    let path = if args.host_file.is_dir() {
        args.host_file.join(INDEX_NAME)
    } else {
        args.host_file.clone()
    };
    let access = Access { write: true, allow_buffered: args.allow_buffered };
    let key = key::present(&args.passphrase, args.key_file.as_deref(), &args.host_file)?;
    let counters = super::CounterArgs {
        counter: args.counter.iter().cloned().collect(),
        access: args.access.clone(),
    };
    let source = Source::one(&counters)?;
    if let Some(source) = &source {
        let before = source.look()?;
        bind(&path, &key, source, access)?;
        let after = source.look()?;
        println!(
            "{}: the newest from now on; the counter was at {} and is at {}",
            args.host_file.display(),
            before.map_or(0, |record| record.sequence),
            after.map_or(0, |record| record.sequence)
        );
    } else {
        let options = OpenOptions { unbind: true, ..OpenOptions::default() };
        reopen(&path, &key, &options, None, access)?;
        println!("{}: bound to no counter any more", args.host_file.display());
    }
    Ok(())
}

/// Takes the volume as it is for the newest: binds it to the counter, whatever that holds.
///
/// # Errors
/// Those of opening the volume for writing, and [`Exit::NoCounter`].
pub fn bind(
    path: &Path,
    key: &SlotKey,
    source: &std::sync::Arc<Source>,
    access: Access,
) -> Result<(), Failure> {
    let options = OpenOptions { counter: Some(source.used(true)), ..OpenOptions::default() };
    reopen(path, key, &options, Some(source), access)
}

/// Opens the volume for writing and closes it. A directory's index that was not closed cleanly stays
/// so: the next run then looks for what was left without a name.
fn reopen(
    path: &Path,
    key: &SlotKey,
    options: &OpenOptions,
    source: Option<&Source>,
    access: Access,
) -> Result<(), Failure> {
    let disk = FileDisk::open(path, access)?;
    let (volume, report) = run_to_end(Volume::open(&disk, key, options))
        .map_err(|error| volume::refused_with(path, &error, source))?;
    if !report.clean && path.ends_with(INDEX_NAME) {
        // What was found is durable, and the counter has moved to it.
        return Ok(());
    }
    run_to_end(volume.close(&disk)).map_err(|errno: Errno| {
        Failure::new(
            Exit::Io,
            format_args!("the volume did not close: {errno}"),
            path.display(),
            "try again; the volume and the counter are whole",
        )
    })
}

impl super::Source {
    /// Binds a volume that was just made, to a counter that holds nothing yet.
    ///
    /// # Errors
    /// [`Exit::Usage`] if the counter is another volume's; as [`bind`].
    pub fn bind_new(
        self: &std::sync::Arc<Self>,
        path: &Path,
        key: &SlotKey,
        access: Access,
    ) -> Result<(), Failure> {
        if let Some(held) = self.look()? {
            return Err(Failure::new(
                Exit::Usage,
                format_args!("the counter is in use, at {}", held.sequence),
                &self.name,
                "each volume needs one of its own; to give up the other volume: \
                 `postern counter reset`",
            ));
        }
        bind(path, key, self, access)
    }
}
