//! The parser's lower half: a type, a name, the attributes before and the bounds behind.

use crate::ast::{Amount, Attributes, Base, Declaration, Keyword};
use crate::error::refuse;
use crate::lexer::Kind;
use crate::parser::{Parsed, Parser};

/// Types that are one word and spelled canonically.
const SINGLE: &[&str] = &[
    "void", "char", "int", "float", "double", "size_t", "wchar_t", "int8_t", "int16_t", "int32_t",
    "int64_t", "uint8_t", "uint16_t", "uint32_t", "uint64_t",
];

/// Words of C that EDL does not have, and what to write instead.
const FOREIGN: &[(&str, &str)] = &[
    ("signed", "leave it out: `int`, `short` and `long` are signed"),
    ("private", "leave it out: a trusted function without `public` is private"),
    ("typedef", "define the type as a struct, union or enum, or in an included C header"),
    ("static", "leave it out"),
    ("extern", "leave it out"),
    ("inline", "leave it out"),
    ("volatile", "leave it out"),
    ("restrict", "leave it out"),
    ("register", "leave it out"),
];

impl Parser {
    pub(crate) fn declaration(&mut self) -> Parsed<Declaration> {
        let doc = self.token().before.clone();
        let attributes = self.attributes()?;
        let constant = self.skips_word("const");
        let base = self.base()?;
        let pointers = self.pointers()?;
        let (name, at) = self.name("a name")?;
        let mut bounds = Vec::new();
        while self.skips('[') {
            match *self.peek() {
                Kind::Number(0) => {
                    return refuse(self.at(), "an array of no elements", "give it at least one");
                }
                Kind::Number(bound) => bounds.push(bound),
                Kind::Mark(']') => {
                    let remedy = "write the number of elements, or use a pointer with `count`";
                    return refuse(self.at(), "an array without a number of elements", remedy);
                }
                _ => return self.expected("a number", "array bounds are decimal numbers"),
            }
            self.take();
            self.mark(']', "close the array bound with `]`")?;
        }
        Ok(Declaration { attributes, constant, base, pointers, name, bounds, doc, at })
    }

    pub(crate) fn pointers(&mut self) -> Parsed<u32> {
        let mut pointers = 0_u32;
        while self.skips('*') {
            pointers = pointers.saturating_add(1);
        }
        if self.is_word("const") {
            let remedy = "put `const` first: EDL has it as the outermost qualifier only";
            return refuse(self.at(), "`const` behind a type", remedy);
        }
        Ok(pointers)
    }

    pub(crate) fn base(&mut self) -> Parsed<Base> {
        let at = self.at();
        let Kind::Word(word) = self.peek().clone() else {
            return self.expected("a type", "name a type of C, of stdint.h, or of this file");
        };
        if let Some(single) = SINGLE.iter().find(|single| **single == word) {
            self.take();
            return Ok(Base::Plain(single));
        }
        if let Some((_, remedy)) = FOREIGN.iter().find(|(foreign, _)| *foreign == word) {
            return refuse(at, format!("`{word}` is not in the EDL grammar"), *remedy);
        }
        let tagged = match word.as_str() {
            "struct" => Some(Keyword::Struct),
            "union" => Some(Keyword::Union),
            "enum" => Some(Keyword::Enum),
            "short" => {
                self.take();
                self.skips_word("int");
                return Ok(Base::Plain("short"));
            }
            "long" => {
                self.take();
                return Ok(Base::Plain(self.long("long", "long long", Some("long double"))?));
            }
            "unsigned" => {
                self.take();
                return Ok(Base::Plain(self.unsigned()?));
            }
            _ => None,
        };
        if let Some(keyword) = tagged {
            self.take();
            let (name, _) = self.name(&format!("the name of a {keyword}"))?;
            if self.is('{') {
                let remedy = "define it by itself directly inside `enclave { ... }`";
                return refuse(self.at(), "a definition inside a declaration", remedy);
            }
            return Ok(Base::Tagged(keyword, name));
        }
        Ok(Base::Named(self.name("a type")?.0))
    }

    fn long(
        &mut self,
        once: &'static str,
        twice: &'static str,
        double: Option<&'static str>,
    ) -> Parsed<&'static str> {
        if let Some(double) = double
            && self.skips_word("double")
        {
            return Ok(double);
        }
        if self.skips_word("long") {
            if self.is_word("int") {
                let remedy = "take `int` out: the grammar has it behind one `long` only";
                return refuse(self.at(), "`int` behind `long long`", remedy);
            }
            return Ok(twice);
        }
        self.skips_word("int");
        Ok(once)
    }

    fn unsigned(&mut self) -> Parsed<&'static str> {
        Ok(if self.skips_word("char") {
            "unsigned char"
        } else if self.skips_word("short") {
            self.skips_word("int");
            "unsigned short"
        } else if self.skips_word("long") {
            self.long("unsigned long", "unsigned long long", None)?
        } else {
            self.skips_word("int");
            "unsigned int"
        })
    }

    pub(crate) fn amount(&mut self) -> Parsed<Amount> {
        if let Kind::Number(number) = *self.peek() {
            self.take();
            return Ok(Amount::Number(number));
        }
        Ok(Amount::Name(self.name("a number or a name")?.0))
    }

    fn attributes(&mut self) -> Parsed<Attributes> {
        let mut attributes = Attributes::default();
        if !self.is('[') {
            return Ok(attributes);
        }
        attributes.at = Some(self.take().at);
        if self.is(']') {
            return refuse(self.at(), "empty attributes", "take `[]` out or write a direction");
        }
        loop {
            self.attribute(&mut attributes)?;
            if !self.skips(',') {
                self.mark(']', "separate attributes with `,` and close them with `]`")?;
                return Ok(attributes);
            }
        }
    }

    fn attribute(&mut self, attributes: &mut Attributes) -> Parsed<()> {
        let (word, at) = self.name("an attribute")?;
        let flag = match word.as_str() {
            "in" => &mut attributes.input,
            "out" => &mut attributes.output,
            "user_check" => &mut attributes.user_check,
            "string" => &mut attributes.string,
            "wstring" => &mut attributes.wstring,
            "isptr" => &mut attributes.isptr,
            "isary" => &mut attributes.isary,
            "readonly" => &mut attributes.readonly,
            "size" | "count" => {
                self.mark('=', "write size=N or count=N, with a number or a parameter's name")?;
                let amount = self.amount()?;
                let place =
                    if word == "size" { &mut attributes.size } else { &mut attributes.count };
                if place.replace(amount).is_some() {
                    return refuse(at, format!("`{word}` twice"), "keep one");
                }
                return Ok(());
            }
            "sizefunc" => {
                return refuse(
                    at,
                    "`sizefunc` is obsolete",
                    "use `size` with a number or a parameter",
                );
            }
            _ => {
                let remedy = "use in, out, user_check, string, wstring, size, count, isptr, isary \
                              or readonly";
                return refuse(at, format!("`{word}` is not an attribute"), remedy);
            }
        };
        if core::mem::replace(flag, true) {
            return refuse(at, format!("`{word}` twice"), "keep one");
        }
        if self.is('=') {
            let remedy = "only `size` and `count` have a value";
            return refuse(self.at(), format!("`{word}` with a value"), remedy);
        }
        Ok(())
    }
}
