//! `postern key`: who can open a volume.
//!
//! Holds: only the header is written; a volume that somebody has open is left alone; the last slot
//! goes only when told so by name.

use std::path::{Path, PathBuf};

use postern_trusted::{
    directory::INDEX_NAME,
    exec::run_to_end,
    volume::{SealingPolicy, SlotInfo, SlotKey, SlotKind, Stretch, Volume},
};
use serde_json::{Value, json};

use crate::{
    cli::{KeyAddArgs, KeyCommand, KeyListArgs, KeyRemoveArgs, PassphraseArgs, VolumeArgs},
    disk::{Access, FileDisk},
    error::Failure,
    key,
    passphrase::Age,
    size,
    volume::refused,
};

/// Runs `postern key`.
///
/// # Errors
/// Those of opening the volume; [`crate::error::Exit::Key`] for keys; [`crate::error::Exit::Usage`] for slots.
pub fn run(command: &KeyCommand) -> Result<(), Failure> {
    match command {
        KeyCommand::List(args) => list(args),
        KeyCommand::Add(args) => put(args, false),
        KeyCommand::Change(args) => put(args, true),
        KeyCommand::Remove(args) => remove(args),
    }
}

/// The host file whose slots count: that of the index for a directory.
pub fn slots_file(host_file: &Path) -> PathBuf {
    if host_file.is_dir() { host_file.join(INDEX_NAME) } else { host_file.to_owned() }
}

/// A volume whose header is about to change.
struct Opened {
    path: PathBuf,
    disk: FileDisk,
    key: SlotKey,
}

fn open(args: &VolumeArgs) -> Result<Opened, Failure> {
    let path = slots_file(&args.host_file);
    let access = Access { write: true, allow_buffered: args.allow_buffered };
    let disk = FileDisk::open(&path, access)?;
    let key = key::present(&args.passphrase, args.key_file.as_deref(), &args.host_file)?;
    Ok(Opened { path, disk, key })
}

fn shown(slot: &SlotInfo) -> Value {
    match slot.kind {
        SlotKind::KeyFile => json!({ "slot": slot.number, "kind": "key file" }),
        SlotKind::Passphrase(Stretch { memory_kib, passes, lanes }) => json!({
            "slot": slot.number,
            "kind": "passphrase",
            "memory_kib": memory_kib,
            "passes": passes,
            "lanes": lanes,
        }),
        SlotKind::Sgx(request) => json!({
            "slot": slot.number,
            "kind": "sgx",
            "policy": policy(request.policy),
            "security_version": request.version,
        }),
        SlotKind::Unknown(kind) => {
            json!({ "slot": slot.number, "kind": format!("unknown ({kind})") })
        }
        _ => json!({ "slot": slot.number, "kind": "unknown" }),
    }
}

/// The enclaves that a slot of kind `sgx` is for.
fn policy(policy: SealingPolicy) -> &'static str {
    match policy {
        SealingPolicy::Enclave => "mrenclave",
        SealingPolicy::Signer => "mrsigner",
    }
}

fn list(args: &KeyListArgs) -> Result<(), Failure> {
    let path = slots_file(&args.host_file);
    let access = Access { write: false, allow_buffered: args.allow_buffered };
    let disk = FileDisk::open(&path, access)?;
    let slots = run_to_end(Volume::slots(&disk)).map_err(|error| refused(&path, &error))?;
    if args.json {
        let host_file = args.host_file.display().to_string();
        let slots: Vec<_> = slots.iter().map(shown).collect();
        println!("{}", json!({ "host_file": host_file, "slots": slots }));
        return Ok(());
    }
    for slot in &slots {
        match slot.kind {
            SlotKind::KeyFile => println!("slot {}  key file", slot.number),
            SlotKind::Passphrase(Stretch { memory_kib, passes, lanes }) => println!(
                "slot {}  passphrase, {} of memory, {passes} passes, {lanes} lanes",
                slot.number,
                size::show(u64::from(memory_kib) << 10)
            ),
            SlotKind::Sgx(request) => println!(
                "slot {}  sgx, policy {}, security version {}",
                slot.number,
                policy(request.policy),
                request.version
            ),
            _ => println!("slot {}  made by another release", slot.number),
        }
    }
    Ok(())
}

/// Answers what was done, for people and for scripts.
fn say(args: &VolumeArgs, did: &str, slot: usize) {
    let host_file = args.host_file.display().to_string();
    if args.json {
        println!("{}", json!({ "host_file": host_file, "slot": slot, "done": did }));
    } else {
        println!("{host_file}: slot {slot}: {did}");
    }
}

fn put(args: &KeyAddArgs, change: bool) -> Result<(), Failure> {
    let Opened { path, disk, key } = open(&args.volume)?;
    let refused = |error| refused(&path, &error);
    // Before a new passphrase is asked for: a wrong key is told at once.
    let own = run_to_end(Volume::slot_of(&disk, &key)).map_err(refused)?;
    let new = match &args.new_key_file {
        Some(file) => Some(SlotKey::new(*key::read(file)?)),
        None => PassphraseArgs {
            passphrase: args.new_passphrase,
            passphrase_file: args.new_passphrase_file.clone(),
        }
        .get(Age::New)?,
    };
    // The command line asks for one of them.
    let Some(new) = new else { return Ok(()) };
    let at = change.then_some(own);
    let put = Volume::put_slot(&disk, &key, &new, Stretch::default(), at);
    let number = run_to_end(put).map_err(refused)?;
    say(&args.volume, if change { "changed" } else { "added" }, number);
    Ok(())
}

fn remove(args: &KeyRemoveArgs) -> Result<(), Failure> {
    let Opened { path, disk, key } = open(&args.volume)?;
    let refused = |error| refused(&path, &error);
    let own = run_to_end(Volume::slot_of(&disk, &key)).map_err(refused)?;
    let number = args.slot.unwrap_or(own);
    run_to_end(Volume::clear_slot(&disk, &key, number, args.destroy_volume)).map_err(refused)?;
    say(&args.volume, "removed", number);
    Ok(())
}
