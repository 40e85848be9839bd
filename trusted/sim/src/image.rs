//! Which library this is and where it lies: two processes with the same answer can share objects
//! that point into it.
#![allow(unsafe_code)]

use core::{
    ffi::{c_int, c_void},
    sync::atomic::{AtomicU8, Ordering},
};

/// Longest build id, in bytes (SHA-1).
const ID_BYTES: usize = 20;
const PT_NOTE: u32 = 4;
const PT_LOAD: u32 = 1;
/// NT_GNU_BUILD_ID.
const BUILD_ID: u32 = 3;

/// Address and build of the code that asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Image {
    base: usize,
    id: [u8; ID_BYTES],
}

/// An address inside this library.
static MARK: AtomicU8 = AtomicU8::new(0);

impl Image {
    /// The calling library's; `None` if it has no build id.
    #[must_use]
    pub fn own() -> Option<Self> {
        let mut found = Self::default();
        // SAFETY: `visit` is called before this returns, with the address given here.
        unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut found).cast()) };
        (found.id != [0; ID_BYTES]).then_some(found)
    }
}

/// Looks at one loaded object; not 0 once ours was seen.
unsafe extern "C" fn visit(info: *mut libc::dl_phdr_info, _: usize, found: *mut c_void) -> c_int {
    let mark = core::ptr::from_ref(&MARK) as usize;
    MARK.store(0, Ordering::Relaxed);
    // SAFETY: 1. The loader's description of one object, valid during the call: program headers
    //    and, for those that are loaded, the bytes they describe. 2. `found` is `own`'s.
    unsafe {
        let info = &*info;
        let start = |header: &libc::Elf64_Phdr| info.dlpi_addr as usize + header.p_vaddr as usize;
        let headers = core::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum));
        let is_ours = headers.iter().any(|header| {
            header.p_type == PT_LOAD
                && (start(header)..start(header) + header.p_memsz as usize).contains(&mark)
        });
        if !is_ours {
            return 0;
        }
        let found = &mut *found.cast::<Image>();
        found.base = headers.iter().find(|h| h.p_type == PT_LOAD).map_or(0, start);
        for header in headers.iter().filter(|header| header.p_type == PT_NOTE) {
            let bytes = start(header) as *const u8;
            let notes = core::slice::from_raw_parts(bytes, header.p_filesz as usize);
            if let Some(id) = build_id(notes) {
                let length = id.len().min(ID_BYTES);
                found.id[..length].copy_from_slice(&id[..length]);
            }
        }
    }
    1
}

/// The build id among ELF notes.
fn build_id(mut notes: &[u8]) -> Option<&[u8]> {
    loop {
        let word = |at: usize| notes.get(at..)?.first_chunk().map(|b| u32::from_ne_bytes(*b));
        let (name, content, kind) = (word(0)? as usize, word(4)? as usize, word(8)?);
        let content_at = 12 + name.next_multiple_of(4);
        let id = notes.get(content_at..content_at.checked_add(content)?)?;
        if kind == BUILD_ID && notes.get(12..12 + name) == Some(b"GNU\0") {
            return Some(id);
        }
        notes = notes.get(content_at + content.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], kind: u32, content: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [name.len() as u32, content.len() as u32, kind] {
            note.extend(word.to_ne_bytes());
        }
        note.extend(name);
        note.resize(note.len().next_multiple_of(4), 0);
        note.extend(content);
        note.resize(note.len().next_multiple_of(4), 0);
        note
    }

    #[test]
    fn the_build_id_is_found_among_other_notes_and_only_where_it_is_whole() {
        let mut notes = note(b"Xen\0", 3, b"123");
        notes.extend(note(b"GNU\0", 1, b"12345"));
        assert_eq!(build_id(&notes), None);
        notes.extend(note(b"GNU\0", 3, b"0123456789abcdefghij"));
        assert_eq!(build_id(&notes), Some(&b"0123456789abcdefghij"[..]));
        for length in 0..notes.len() {
            assert_eq!(build_id(&notes[..length]), None, "{length}");
        }
        assert_eq!(build_id(&[0xff; 64]), None);
    }
}
