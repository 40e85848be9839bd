//! How a control call travels: one request, one reply, both whole little-endian 8-byte words.
//!
//! ```text
//! request   call number (from 1, in the order of postern.edl), then the fields
//! reply     errno, then, if it is 0, the out values
//! integer   one word, sign-extended; an enum too
//! array     its elements, no length
//! struct    its members
//! buffer    number of elements, then the elements; of bytes: packed, zero-padded to whole words
//! text      as a buffer of bytes: UTF-8, no NUL inside or at the end
//! ```
//!
//! Each value has one encoding, and [`Reader`] accepts no other: `decode(encode(x)) == x` and
//! `encode(decode(bytes)) == bytes`.
//!
//! Holds whatever the bytes are: no panic, and no more memory than a small multiple of their length.

use alloc::{string::String, vec::Vec};
use core::fmt;

/// Largest errno that Linux uses.
const MAX_ERRNO: u32 = 4095;
/// Input/output error: what a host that answers with an impossible errno is taken to mean.
const EIO: u32 = 5;
/// Value too large for its type: the host had more to say than was asked for.
const EOVERFLOW: u32 = 75;

/// Why bytes are not a message. `word` counts 8-byte words from the start of the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Malformed {
    /// The message is not a whole number of words.
    Ragged {
        /// Its length in bytes.
        bytes: usize,
    },
    /// The message ends before the value at `word` does.
    Short {
        /// Where the value begins.
        word: usize,
    },
    /// The message goes on behind its last value.
    Long {
        /// The first word too many.
        word: usize,
    },
    /// No call has this number.
    UnknownCall {
        /// The number.
        call: u64,
    },
    /// The word is not a value of its type.
    Range {
        /// Where it stands.
        word: usize,
    },
    /// A buffer is longer than it may be.
    TooLong {
        /// Where it begins.
        word: usize,
        /// Elements it has.
        length: u64,
        /// Elements it may have.
        limit: u64,
    },
    /// The bytes that fill up a buffer's last word are not zero.
    Padding {
        /// Where the buffer begins.
        word: usize,
    },
    /// A text is not UTF-8 or has a NUL inside.
    Text {
        /// Where it begins.
        word: usize,
    },
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ragged { bytes } => write!(f, "message of {bytes} bytes is not whole words"),
            Self::Short { word } => write!(f, "message ends inside the value at word {word}"),
            Self::Long { word } => write!(f, "message goes on at word {word}, behind its end"),
            Self::UnknownCall { call } => write!(f, "no call has number {call}"),
            Self::Range { word } => write!(f, "word {word} is out of its type's range"),
            Self::TooLong { word, length, limit } => {
                write!(f, "buffer at word {word} has {length} elements of at most {limit}")
            }
            Self::Padding { word } => write!(f, "buffer at word {word} is not padded with zeros"),
            Self::Text { word } => write!(f, "text at word {word} is not UTF-8 or has a NUL"),
        }
    }
}

impl core::error::Error for Malformed {}

/// How the enclave reaches the host: one request, one reply.
pub trait Carrier {
    /// Why a message did not get across.
    type Error;

    /// Sends `request` and puts the answer in place of what `reply` held.
    ///
    /// The carrier bounds the answer's length and the time it waits; it looks into neither message.
    ///
    /// # Errors
    /// The carrier's own. Whether the host saw the request is then unknown.
    fn call(&mut self, request: &[u8], reply: &mut Vec<u8>) -> Result<(), Self::Error>;
}

/// Why a call did not succeed, by who has to act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallError<E> {
    /// The way to the host is broken: connect again.
    Carrier(E),
    /// The host said no: a Linux errno, 1..=4095.
    Refused(u32),
    /// The host answered what is no answer, or the request cannot be written down.
    Malformed(Malformed),
}

impl<E> From<Malformed> for CallError<E> {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

impl<E: fmt::Display> fmt::Display for CallError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Carrier(error) => write!(f, "the host could not be reached: {error}"),
            Self::Refused(errno) => write!(f, "the host refused with errno {errno}"),
            Self::Malformed(malformed) => write!(f, "not a message of this boundary: {malformed}"),
        }
    }
}

impl<E: fmt::Debug + fmt::Display> core::error::Error for CallError<E> {}

/// A value with a fixed number of words.
pub trait Wire: Sized {
    /// Writes it.
    fn put(&self, writer: &mut Writer<'_>);

    /// Reads one.
    ///
    /// # Errors
    /// [`Malformed`] if the next words are not its encoding.
    fn get(reader: &mut Reader<'_>) -> Result<Self, Malformed>;
}

/// Writes a message.
#[derive(Debug)]
pub struct Writer<'a> {
    bytes: &'a mut Vec<u8>,
    fault: Option<Malformed>,
}

impl<'a> Writer<'a> {
    /// Begins a message in place of what `bytes` held.
    pub fn new(bytes: &'a mut Vec<u8>) -> Self {
        bytes.clear();
        Self { bytes, fault: None }
    }

    /// Begins the reply of a call that succeeded.
    pub fn reply(bytes: &'a mut Vec<u8>) -> Self {
        let mut writer = Self::new(bytes);
        writer.word(0);
        writer
    }

    /// Writes the reply of a call that failed; an impossible errno becomes EIO.
    pub fn refusal(bytes: &mut Vec<u8>, errno: u32) {
        let errno = if (1..=MAX_ERRNO).contains(&errno) { errno } else { EIO };
        Writer::new(bytes).word(u64::from(errno));
    }

    fn position(&self) -> usize {
        self.bytes.len() / 8
    }

    fn word(&mut self, word: u64) {
        self.bytes.extend_from_slice(&word.to_le_bytes());
    }

    fn length(&mut self, length: usize, limit: u64) {
        let (word, length) = (self.position(), length as u64);
        if length > limit {
            self.fault.get_or_insert(Malformed::TooLong { word, length, limit });
        }
        self.word(length);
    }

    /// Writes a buffer of bytes, of which there may be `limit`.
    pub fn bytes(&mut self, bytes: &[u8], limit: u64) {
        self.length(bytes.len(), limit);
        self.bytes.extend_from_slice(bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }

    /// Writes a buffer of values, of which there may be `limit`.
    pub fn values<T: Wire>(&mut self, values: &[T], limit: u64) {
        self.length(values.len(), limit);
        for value in values {
            value.put(self);
        }
    }

    /// Writes a text.
    pub fn text(&mut self, text: &str) {
        let word = self.position();
        if text.contains('\0') {
            self.fault.get_or_insert(Malformed::Text { word });
        }
        self.bytes(text.as_bytes(), u64::MAX);
    }

    /// Ends a request.
    ///
    /// # Errors
    /// What could not be written down.
    pub fn end(self) -> Result<(), Malformed> {
        self.fault.map_or(Ok(()), Err)
    }

    /// Ends a reply; one that could not be written down becomes EOVERFLOW.
    pub fn end_reply(self) {
        if self.fault.is_some() {
            Writer::refusal(self.bytes, EOVERFLOW);
        }
    }
}

/// Reads a message, value by value.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
    /// Words read.
    read: usize,
}

impl<'a> Reader<'a> {
    /// Begins to read.
    ///
    /// # Errors
    /// [`Malformed::Ragged`].
    pub fn new(bytes: &'a [u8]) -> Result<Self, Malformed> {
        if bytes.len().is_multiple_of(8) {
            Ok(Self { rest: bytes, read: 0 })
        } else {
            Err(Malformed::Ragged { bytes: bytes.len() })
        }
    }

    /// Begins to read a reply and stands at its first out value.
    ///
    /// # Errors
    /// [`CallError::Refused`] if it is a refusal, [`CallError::Malformed`] if it is no reply.
    pub fn reply<E>(bytes: &'a [u8]) -> Result<Self, CallError<E>> {
        let mut reader = Self::new(bytes)?;
        match u32::get(&mut reader)? {
            0 => Ok(reader),
            errno @ 1..=MAX_ERRNO => {
                reader.end()?;
                Err(CallError::Refused(errno))
            }
            _ => Err(CallError::Malformed(Malformed::Range { word: 0 })),
        }
    }

    /// The number of words read so far.
    #[must_use]
    pub fn position(&self) -> usize {
        self.read
    }

    fn word(&mut self) -> Result<u64, Malformed> {
        let Some((word, rest)) = self.rest.split_first_chunk() else {
            return Err(Malformed::Short { word: self.read });
        };
        self.rest = rest;
        self.read += 1;
        Ok(u64::from_le_bytes(*word))
    }

    fn length(&mut self, limit: u64) -> Result<u64, Malformed> {
        let word = self.read;
        let length = self.word()?;
        if length > limit {
            return Err(Malformed::TooLong { word, length, limit });
        }
        Ok(length)
    }

    fn packed(&mut self, limit: u64) -> Result<&'a [u8], Malformed> {
        let word = self.read;
        let length = self.length(limit)?;
        let length = usize::try_from(length).map_err(|_| Malformed::Short { word })?;
        // `rest` is whole words, so what lies within it has its padding within it too.
        let Some((bytes, rest)) = self.rest.split_at_checked(length) else {
            return Err(Malformed::Short { word });
        };
        let (padding, rest) = rest.split_at(rest.len() % 8);
        if padding.iter().any(|byte| *byte != 0) {
            return Err(Malformed::Padding { word });
        }
        self.rest = rest;
        self.read += length.div_ceil(8);
        Ok(bytes)
    }

    /// Reads a buffer of bytes, of which there may be `limit`.
    ///
    /// # Errors
    /// [`Malformed::TooLong`], [`Malformed::Short`] or [`Malformed::Padding`].
    pub fn bytes(&mut self, limit: u64) -> Result<Vec<u8>, Malformed> {
        Ok(self.packed(limit)?.to_vec())
    }

    /// Reads a buffer of values, of which there may be `limit`.
    ///
    /// # Errors
    /// [`Malformed::TooLong`], or what a value refuses.
    pub fn values<T: Wire>(&mut self, limit: u64) -> Result<Vec<T>, Malformed> {
        let word = self.read;
        let length = self.length(limit)?;
        // A value has at least one word: a longer buffer is not there, and is not allocated for.
        if length > (self.rest.len() / 8) as u64 {
            return Err(Malformed::Short { word });
        }
        (0..length).map(|_| T::get(self)).collect()
    }

    /// Reads a text.
    ///
    /// # Errors
    /// [`Malformed::Text`], or as [`Self::bytes`].
    pub fn text(&mut self) -> Result<String, Malformed> {
        let word = self.read;
        let bytes = self.packed(u64::MAX)?;
        match core::str::from_utf8(bytes) {
            Ok(text) if !text.contains('\0') => Ok(String::from(text)),
            _ => Err(Malformed::Text { word }),
        }
    }

    /// Ends the message.
    ///
    /// # Errors
    /// [`Malformed::Long`] if something is left.
    pub fn end(&self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed::Long { word: self.read }) }
    }
}

impl Wire for u64 {
    fn put(&self, writer: &mut Writer<'_>) {
        writer.word(*self);
    }

    fn get(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        reader.word()
    }
}

impl Wire for i64 {
    fn put(&self, writer: &mut Writer<'_>) {
        writer.word(self.cast_unsigned());
    }

    fn get(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        reader.word().map(u64::cast_signed)
    }
}

macro_rules! narrow {
    ($($narrow:ty => $wide:ty),*) => {$(
        impl Wire for $narrow {
            fn put(&self, writer: &mut Writer<'_>) {
                <$wide>::from(*self).put(writer);
            }

            fn get(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
                let word = reader.position();
                Self::try_from(<$wide>::get(reader)?).map_err(|_| Malformed::Range { word })
            }
        }
    )*};
}

narrow!(u8 => u64, u16 => u64, u32 => u64, i8 => i64, i16 => i64, i32 => i64);

impl<T: Wire + Default, const N: usize> Wire for [T; N] {
    fn put(&self, writer: &mut Writer<'_>) {
        for value in self {
            value.put(writer);
        }
    }

    fn get(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let mut values = core::array::from_fn(|_| T::default());
        for value in &mut values {
            *value = T::get(reader)?;
        }
        Ok(values)
    }
}
