//! The table against a model of paths, and images of any content.

use alloc::{collections::BTreeMap, string::String, vec, vec::Vec};

use proptest::prelude::*;

use super::*;
use crate::{counter::Record, errno::Errno};

const BORN: Attributes = Attributes::new(0o755, 1, 2, 3);

fn id(n: u16) -> FileId {
    let mut id = [7; 16];
    id[..2].copy_from_slice(&n.to_le_bytes());
    id
}

#[test]
fn a_host_file_is_called_after_its_id() {
    assert_eq!(host_name(&[0xab; 16]), "ab".repeat(16));
}

/// What a step of a script does, on the paths of a few names.
#[derive(Clone, Debug)]
enum Step {
    File(Vec<u8>),
    Directory(Vec<u8>),
    Unlink(Vec<u8>),
    RemoveDirectory(Vec<u8>),
    Rename(Vec<u8>, Vec<u8>, Rename),
}

/// One to three parts, each one of two names.
fn path() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(0..3_u8, 1..4)
}

fn step() -> impl Strategy<Value = Step> {
    let how = prop::sample::select(&[Rename::Replace, Rename::NoReplace, Rename::Exchange][..]);
    prop_oneof![
        3 => path().prop_map(Step::File),
        3 => path().prop_map(Step::Directory),
        1 => path().prop_map(Step::Unlink),
        1 => path().prop_map(Step::RemoveDirectory),
        3 => (path(), path(), how).prop_map(|(from, to, how)| Step::Rename(from, to, how)),
    ]
}

/// The model: every path that exists, and whether a number of a file or a directory is there.
#[derive(Default)]
struct Model(BTreeMap<Vec<u8>, Option<u16>>);

impl Model {
    /// `Some(None)`: a directory.
    fn get(&self, path: &[u8]) -> Option<Option<u16>> {
        if path.is_empty() { Some(None) } else { self.0.get(path).copied() }
    }

    /// The first part on the way to `path` that is missing or no directory.
    fn parent(&self, path: &[u8]) -> Result<(), Errno> {
        for length in 0..path.len() {
            match self.get(&path[..length]) {
                Some(None) => {}
                Some(Some(_)) => return Err(Errno::ENOTDIR),
                None => return Err(Errno::ENOENT),
            }
        }
        Ok(())
    }

    fn has_children(&self, path: &[u8]) -> bool {
        self.0.keys().any(|other| other.len() > path.len() && other.starts_with(path))
    }

    fn take(&mut self, path: &[u8]) -> Vec<(Vec<u8>, Option<u16>)> {
        let found: Vec<_> = self.0.keys().filter(|k| k.starts_with(path)).cloned().collect();
        found.into_iter().map(|k| (k[path.len()..].to_vec(), self.0.remove(&k).unwrap())).collect()
    }

    fn put(&mut self, path: &[u8], taken: Vec<(Vec<u8>, Option<u16>)>) {
        self.0.extend(taken.into_iter().map(|(rest, what)| ([path, &rest].concat(), what)));
    }

    fn run(&mut self, step: &Step, number: u16) -> Result<(), Errno> {
        match step {
            Step::File(path) | Step::Directory(path) => {
                self.parent(path)?;
                if self.get(path).is_some() {
                    return Err(Errno::EEXIST);
                }
                let what = matches!(step, Step::File(_)).then_some(number);
                self.0.insert(path.clone(), what);
            }
            Step::Unlink(path) => {
                self.parent(path)?;
                self.get(path).ok_or(Errno::ENOENT)?.ok_or(Errno::EISDIR)?;
                self.0.remove(path);
            }
            Step::RemoveDirectory(path) => {
                self.parent(path)?;
                match self.get(path).ok_or(Errno::ENOENT)? {
                    Some(_) => return Err(Errno::ENOTDIR),
                    None if self.has_children(path) => return Err(Errno::ENOTEMPTY),
                    None => self.0.remove(path),
                };
            }
            Step::Rename(from, to, how) => self.rename(from, to, *how)?,
        }
        Ok(())
    }

    fn rename(&mut self, from: &[u8], to: &[u8], how: Rename) -> Result<(), Errno> {
        self.parent(from)?;
        self.parent(to)?;
        let moved = self.get(from).ok_or(Errno::ENOENT)?;
        let target = self.get(to);
        match how {
            Rename::NoReplace if target.is_some() => return Err(Errno::EEXIST),
            Rename::Exchange if target.is_none() => return Err(Errno::ENOENT),
            _ => {}
        }
        if moved.is_none() && to.len() > from.len() && to.starts_with(from) {
            return Err(Errno::EINVAL);
        }
        if target == Some(None) && from.len() > to.len() && from.starts_with(to) {
            let exchange = how == Rename::Exchange;
            return Err(if exchange { Errno::EINVAL } else { Errno::ENOTEMPTY });
        }
        if from == to {
            return Ok(());
        }
        let taken = self.take(from);
        if how == Rename::Exchange {
            let other = self.take(to);
            self.put(from, other);
            self.put(to, taken);
            return Ok(());
        }
        let refusal = match (moved, target) {
            (None, Some(Some(_))) => Some(Errno::ENOTDIR),
            (None, Some(None)) if self.has_children(to) => Some(Errno::ENOTEMPTY),
            (Some(_), Some(None)) => Some(Errno::EISDIR),
            _ => None,
        };
        if let Some(errno) = refusal {
            self.put(from, taken);
            return Err(errno);
        }
        self.0.remove(to);
        self.put(to, taken);
        Ok(())
    }
}

fn name(part: u8) -> [u8; 1] {
    [b'a' + part]
}

/// The directory that `path` is in.
fn walk(table: &Table, path: &[u8]) -> Result<u64, Errno> {
    path[..path.len() - 1].iter().try_fold(ROOT, |at, part| {
        let next = table.lookup(at, &name(*part))?;
        table.entries(next).map(|_| next)
    })
}

fn run(table: &mut Table, step: &Step, number: u16) -> Result<(), Errno> {
    let last = |path: &[u8]| name(path[path.len() - 1]);
    let now = i64::from(number);
    match step {
        Step::File(path) => {
            table.create(walk(table, path)?, &last(path), Some(id(number)), BORN).map(drop)
        }
        Step::Directory(path) => {
            table.create(walk(table, path)?, &last(path), None, BORN).map(drop)
        }
        Step::Unlink(path) => {
            let gone = table.unlink(walk(table, path)?, &last(path), now)?;
            assert_eq!(table.path(gone), None);
            table.forget(gone);
            Ok(())
        }
        Step::RemoveDirectory(path) => {
            let gone = table.remove_directory(walk(table, path)?, &last(path), now)?;
            table.forget(gone);
            Ok(())
        }
        Step::Rename(from, to, how) => {
            let places = (walk(table, from)?, walk(table, to)?);
            let gone = table.rename((places.0, &last(from)), (places.1, &last(to)), *how, now)?;
            gone.into_iter().for_each(|gone| table.forget(gone));
            Ok(())
        }
    }
}

/// All paths of a table, as the model has them.
fn paths(table: &Table) -> BTreeMap<Vec<u8>, Option<u16>> {
    let named = table.nodes().filter(|(inode, _)| *inode != ROOT);
    named
        .map(|(inode, node)| {
            let path = table.path(inode).unwrap();
            let parts = path.split(|c| *c == b'/').skip(1).map(|part| part[0] - b'a').collect();
            (parts, node.file().map(|id| u16::from_le_bytes([id[0], id[1]])))
        })
        .collect()
}

proptest! {
    /// The table answers every step as the model of paths does, and survives its image.
    #[test]
    fn a_table_is_its_paths_whatever_is_done(script in prop::collection::vec(step(), 0..60)) {
        let (mut table, mut model) = (Table::new(BORN), Model::default());
        for (number, step) in script.iter().enumerate() {
            let number = number as u16;
            prop_assert_eq!(run(&mut table, step, number), model.run(step, number), "{:?}", step);
            prop_assert_eq!(&paths(&table), &model.0);
        }
        let image = table.encode(77);
        prop_assert_eq!(Table::image_bytes(&image), Ok(image.len()));
        prop_assert_eq!(Table::decode(&image), Ok((table, 77)));
    }

    /// A changed byte is never taken for a table, and no bytes make it panic.
    #[test]
    fn an_altered_image_is_refused(at in any::<prop::sample::Index>(), flip in 1..=255_u8) {
        let mut table = Table::new(BORN);
        table.create(ROOT, b"a", Some(id(1)), BORN).unwrap();
        let mut image = table.encode(1);
        let at = at.index(image.len());
        image[at] ^= flip;
        prop_assert!(Table::decode(&image).is_err());
    }

    #[test]
    fn garbage_decodes_to_an_error(bytes in prop::collection::vec(any::<u8>(), 0..9000)) {
        prop_assert!(Table::decode(&bytes).is_err());
    }
}

/// An image with its digest made right again.
fn resealed(table: &Table, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut image = table.encode(1);
    change(&mut image);
    image[40..72].fill(0);
    let body = u64::from_le_bytes(image[32..40].try_into().unwrap()) as usize;
    let digest = crate::volume::sha256(&image[..72 + body]);
    image[40..72].copy_from_slice(&digest);
    image
}

#[test]
fn a_whole_image_that_contradicts_itself_is_refused() {
    let mut table = Table::new(BORN);
    let directory = table.create(ROOT, b"a", None, BORN).unwrap();
    table.create(directory, b"b", Some(id(1)), BORN).unwrap();
    let file = 72 + 68 + 69; // The third record; names take 0 and 1 bytes before it.
    assert!(Table::decode(&resealed(&table, |_| {})).is_ok());
    let refused = |what: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let decoded = Table::decode(&resealed(&table, change));
        assert!(matches!(decoded, Err(BadImage::Inconsistent { .. })), "{what}: {decoded:?}");
    };
    refused("an inode twice", &|i| i[file] = 2);
    refused("inode 0", &|i| i[file] = 0);
    refused("an inode that was never given", &|i| i[file] = 200);
    refused("a parent that is not there", &|i| i[file + 8] = 9);
    refused("itself as a parent", &|i| i[file + 8] = 3);
    refused("a name with a slash", &|i| i[file + 68] = b'/');
    refused("a kind that is none", &|i| i[file + 66] = 3);
    refused("a directory with an id", &|i| i[file + 66] = 1);
    refused("a mode beyond its bits", &|i| i[file + 65] = 0x10);
    refused("a record too few", &|i| i[24] = 2);
    refused("a record too many", &|i| i[24] = 4);
}

#[test]
fn the_newest_whole_slot_counts_and_two_torn_ones_are_damage() {
    let table = |n: u64| (Table::new(Attributes { changed: n as i64, ..BORN }), n);
    let chosen = |slots| choose(slots).map(|found| found.map(|(_, sequence)| sequence));
    assert_eq!(chosen([Ok(table(4)), Ok(table(3))]), Ok(Some(4)));
    assert_eq!(chosen([Ok(table(4)), Ok(table(5))]), Ok(Some(5)));
    assert_eq!(chosen([Err(BadImage::Torn), Ok(table(5))]), Ok(Some(5)));
    assert_eq!(chosen([Ok(table(4)), Err(BadImage::Empty)]), Ok(Some(4)));
    assert_eq!(chosen([Err(BadImage::Empty), Err(BadImage::Torn)]), Ok(None));
    assert_eq!(chosen([Err(BadImage::Empty), Err(BadImage::Empty)]), Ok(None));
    assert_eq!(chosen([Err(BadImage::Torn), Err(BadImage::Torn)]), Err(BadImage::Torn));
    let inconsistent = BadImage::Inconsistent { record: 1 };
    assert_eq!(chosen([Ok(table(4)), Err(inconsistent)]), Err(inconsistent));
    assert_eq!((slot_offset(2), slot_offset(3)), (0, SLOT_BYTES));
    assert_eq!(Table::decode(&vec![0; 8192]), Err(BadImage::Empty));
}

#[test]
fn a_table_grows_to_its_slot_and_no_further() {
    let mut table = Table::new(BORN);
    let long = |n: u32| {
        let mut name = alloc::format!("{n:010}").into_bytes();
        name.resize(NAME_MAX, b'x');
        name
    };
    let mut made = 0;
    let refused = loop {
        let mut id = [0; 16];
        id[..4].copy_from_slice(&u32::to_le_bytes(made));
        match table.create(ROOT, &long(made), Some(id), BORN) {
            Ok(inode) => {
                table.set_record(inode, Some(Record { sequence: 1, digest: [7; 32] })).unwrap();
                made += 1;
            }
            Err(errno) => break errno,
        }
    };
    assert_eq!(refused, Errno::ENOSPC);
    let image = table.encode(1);
    assert!(image.len() as u64 <= SLOT_BYTES && image.len() as u64 + 400 > SLOT_BYTES);
    assert_eq!(Table::decode(&image).map(|(table, _)| table.len()), Ok(made as usize + 1));
    table.unlink(ROOT, &long(0), 0).unwrap();
    assert!(table.create(ROOT, &long(made), None, BORN).is_ok());
}

/// A table as a build without records made it: as many files without one as there is room for.
fn full_of_unrecorded(name_bytes: usize) -> (Table, Vec<u64>) {
    const LIMIT: usize = SLOT_BYTES as usize - 72;
    let long = |n: u64| {
        let mut name = alloc::format!("{n:010}").into_bytes();
        name.resize(name_bytes, b'x');
        name
    };
    // The root and a directory that has no file yet: the image to put files into.
    let mut table = Table::new(BORN);
    let image = table.encode(1);
    let files = (LIMIT - 68) / (68 + name_bytes);
    let mut body = Vec::with_capacity(LIMIT);
    body.extend_from_slice(&image[72..72 + 68]);
    let record = {
        let file = table.create(ROOT, &long(0), Some(id(0)), BORN).unwrap();
        assert_eq!(file, 2);
        table.encode(1)[72 + 68..72 + 68 + 68 + name_bytes].to_vec()
    };
    for n in 0..files as u64 {
        let at = body.len();
        body.extend_from_slice(&record);
        body[at..at + 8].copy_from_slice(&(2 + n).to_le_bytes());
        body[at + 16..at + 24].copy_from_slice(&n.to_le_bytes());
        body[at + 68..].copy_from_slice(&long(n));
    }
    let mut image = vec![0; (72 + body.len()).next_multiple_of(IMAGE_BLOCK)];
    image[..8].copy_from_slice(b"PSTNDIR1");
    let words = [1, 2 + files as u64, 1 + files as u64, body.len() as u64];
    for (word, at) in words.into_iter().zip((8..).step_by(8)) {
        image[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }
    image[72..72 + body.len()].copy_from_slice(&body);
    let digest = crate::volume::sha256(&image[..72 + body.len()]);
    image[40..72].copy_from_slice(&digest);
    let (table, _) = Table::decode(&image).unwrap();
    (table, (2..2 + files as u64).collect())
}

#[test]
fn a_record_for_which_a_table_of_before_records_is_too_full_is_refused_and_nothing_is_lost() {
    // The last slot's rest is larger than a record, by this much.
    let (mut table, files) = full_of_unrecorded(100);
    let record = |n| Some(Record { sequence: n, digest: [7; 32] });
    let room = SLOT_BYTES as usize - 72 - (68 + files.len() * 168);
    let fits = room / Record::BYTES;
    assert!(fits < 5, "{room} bytes are left");
    for (n, file) in files.iter().enumerate().take(20) {
        let set = table.set_record(*file, record(1));
        assert_eq!(set, if n < fits { Ok(()) } else { Err(Errno::ENOSPC) }, "file {n}");
    }
    // Whoever has one keeps it up to date.
    let recorded = |table: &Table, n: usize| table.node(files[n]).unwrap().record;
    (0..fits).for_each(|n| assert_eq!(table.set_record(files[n], record(2)), Ok(())));
    (0..20).for_each(|n| assert_eq!(recorded(&table, n), record(2).filter(|_| n < fits)));
    let image = table.encode(3);
    assert!(image.len() as u64 <= SLOT_BYTES);
    assert_eq!(Table::decode(&image), Ok((table.clone(), 3)));
    // A removed file makes room: 168 bytes for four records of 40.
    let name = table.node(files[30]).unwrap().name.clone();
    table.unlink(ROOT, &name, 1).unwrap();
    let more = (room + 168) / Record::BYTES - fits;
    assert!(more >= 4);
    for file in &files[fits..fits + more] {
        assert_eq!(table.set_record(*file, record(1)), Ok(()), "file {file}");
    }
    assert_eq!(table.set_record(files[fits + more], record(1)), Err(Errno::ENOSPC));
    // What has no name is in no image, and needs no room there.
    let unnamed = table.create_orphan([9; 16], BORN);
    assert_eq!(table.set_record(unnamed, record(1)), Ok(()));
    assert_eq!(table.node(unnamed).unwrap().record, record(1));
    assert!(table.encode(4).len() as u64 <= SLOT_BYTES);
}

/// An image of a build without records is one in which no file has any.
#[test]
fn records_of_files_survive_the_image_and_files_without_one_stay_without() {
    let mut table = Table::new(BORN);
    let with = table.create(ROOT, b"a", Some(id(1)), BORN).unwrap();
    let without = table.create(ROOT, b"b", Some(id(2)), BORN).unwrap();
    let directory = table.create(ROOT, b"d", None, BORN).unwrap();
    let record = Some(Record { sequence: 9, digest: [3; 32] });
    table.set_record(with, record).unwrap();
    table.set_record(directory, record).unwrap();
    let (read, _) = Table::decode(&table.encode(2)).unwrap();
    let recorded = |inode| read.node(inode).unwrap().record;
    assert_eq!([with, without, directory].map(recorded), [record, None, None]);
    assert_eq!(read, table);
}

#[test]
fn a_removed_directory_takes_no_new_names() {
    let mut table = Table::new(BORN);
    let gone = table.create(ROOT, b"d", None, BORN).unwrap();
    table.remove_directory(ROOT, b"d", 1).unwrap();
    assert_eq!(table.create(gone, b"f", None, BORN), Err(Errno::ENOENT));
    table.create(ROOT, b"f", None, BORN).unwrap();
    let moved = table.rename((ROOT, b"f"), (gone, b"f"), Rename::Replace, 1);
    assert_eq!(moved, Err(Errno::ENOENT));
    assert_eq!(table.create(ROOT, &[b'x'; 256], None, BORN), Err(Errno::ENAMETOOLONG));
    let shown: String = alloc::format!("{}", BadImage::Torn);
    assert!(shown.contains("not whole"));
}
