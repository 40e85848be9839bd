//! Names for addresses of an enclave: for messages and dumps, never for a decision.

use crate::elf::Elf;

/// The functions and data of an ELF file by address. Empty for a file that has no symbols.
#[derive(Clone, Debug, Default)]
pub struct Symbols {
    /// By address: address, bytes, name.
    all: Vec<(u64, u64, String)>,
    functions: Vec<u64>,
}

impl Symbols {
    /// Those of this ELF file; none if it is no ELF file.
    #[must_use]
    pub fn of_elf(file: &[u8]) -> Self {
        let Ok(elf) = Elf::parse(file) else { return Self::default() };
        let mut all: Vec<_> = elf
            .symbols()
            .filter(|symbol| symbol.is_defined && symbol.address != 0 && !symbol.name.is_empty())
            .map(|symbol| {
                let name = String::from_utf8_lossy(symbol.name);
                // The alternate form leaves the crates' hashes out.
                let name = format!("{:#}", rustc_demangle::demangle(&name));
                (symbol.address, symbol.size, name)
            })
            .collect();
        all.sort_unstable();
        all.dedup_by_key(|(address, _, _)| *address);
        let mut functions: Vec<u64> = elf
            .symbols()
            .filter(|symbol| symbol.is_defined && symbol.is_function)
            .map(|symbol| symbol.address)
            .collect();
        functions.sort_unstable();
        functions.dedup();
        Self { all, functions }
    }

    /// Where functions begin, ascending.
    #[must_use]
    pub fn functions(&self) -> &[u64] {
        &self.functions
    }

    /// The symbol that `offset` of the enclave lies in, and how far in. `None` if it lies in none.
    #[must_use]
    pub fn at(&self, offset: u64) -> Option<(&str, u64)> {
        let after = self.all.partition_point(|(address, _, _)| *address <= offset);
        let (address, size, name) = self.all.get(after.checked_sub(1)?)?;
        let into = offset - address;
        (into < (*size).max(1) || (*size == 0 && into < 4096)).then_some((name.as_str(), into))
    }

    /// `name+0x10`, or the bare offset where there is no name.
    #[must_use]
    pub fn name(&self, offset: u64) -> String {
        match self.at(offset) {
            Some((name, 0)) => name.to_owned(),
            Some((name, into)) => format!("{name}+{into:#x}"),
            None => format!("offset {offset:#x}"),
        }
    }
}
