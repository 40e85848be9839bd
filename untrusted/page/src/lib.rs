//! The page that shows what a daemon measures, in two forms: files that posternd serves, or one
//! document with everything in it.
//!
//! Holds: nothing on the page comes from elsewhere; no text that is shown is ever read as markup
//! (the scripts set text only; what the document carries can not end its element).

#![no_std]

extern crate alloc;

use alloc::string::{String, ToString as _};

/// A file that the page consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asset {
    /// Path below the server's root.
    pub path: &'static str,
    /// Its `Content-Type`.
    pub content_type: &'static str,
    /// What is in it.
    pub text: &'static str,
}

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// The files of the page. Scripts come after those that they import.
pub const ASSETS: [Asset; 8] = [
    Asset {
        path: "/",
        content_type: "text/html; charset=utf-8",
        text: include_str!("../assets/index.html"),
    },
    Asset {
        path: "/style.css",
        content_type: "text/css; charset=utf-8",
        text: include_str!("../assets/style.css"),
    },
    Asset {
        path: "/icon.svg",
        content_type: "image/svg+xml",
        text: include_str!("../assets/icon.svg"),
    },
    Asset { path: "/numbers.js", content_type: SCRIPT, text: include_str!("../assets/numbers.js") },
    Asset {
        path: "/interval.js",
        content_type: SCRIPT,
        text: include_str!("../assets/interval.js"),
    },
    Asset { path: "/draw.js", content_type: SCRIPT, text: include_str!("../assets/draw.js") },
    Asset { path: "/views.js", content_type: SCRIPT, text: include_str!("../assets/views.js") },
    Asset { path: "/app.js", content_type: SCRIPT, text: include_str!("../assets/app.js") },
];

/// What a browser may do on the served page: fetch from where it came from, and no more.
pub const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
    img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; \
    frame-ancestors 'none'";

/// The lines of the page that name its other files.
const ICON: &str = "<link rel=\"icon\" href=\"icon.svg\">\n";
const STYLE: &str = "<link rel=\"stylesheet\" href=\"style.css\">\n";
const APP: &str = "<script type=\"module\" src=\"app.js\"></script>\n";

/// The file at a path.
#[must_use]
pub fn asset(path: &str) -> Option<&'static Asset> {
    ASSETS.iter().find(|asset| asset.path == path)
}

/// The page as one document that shows `data`, a JSON text. `nonce` marks what a browser may run of
/// it: letters and digits that nobody could foresee when the data came about.
#[must_use]
pub fn document(data: &str, nonce: &str) -> String {
    let text = |path| asset(path).map_or("", |asset| asset.text);
    let policy = alloc::format!(
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; \
         script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; base-uri 'none'; \
         form-action 'none'\">\n"
    );
    let style = alloc::format!("<style nonce=\"{nonce}\">\n{}</style>\n", text("/style.css"));
    // A `<` occurs in JSON inside of strings only, where this means the same.
    let data = data.replace('<', "\\u003c");
    let data = alloc::format!("<script type=\"application/json\" id=\"data\">{data}</script>\n");
    let app =
        alloc::format!("<script type=\"module\" nonce=\"{nonce}\">\n{}</script>\n", scripts());
    let page = text("/").replacen(ICON, &policy, 1).replacen(STYLE, &style, 1);
    page.replacen(APP, &(data + &app), 1)
}

/// All scripts as one: a name means the same in each of them.
fn scripts() -> String {
    let mut all = String::new();
    for script in ASSETS.iter().filter(|asset| asset.content_type == SCRIPT) {
        for line in script.text.lines().filter(|line| !line.starts_with("import ")) {
            all += line.strip_prefix("export ").unwrap_or(line);
            all += "\n";
        }
    }
    all.to_string()
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::collections::BTreeSet;
    use std::vec::Vec;

    use super::*;

    fn scripts_of_the_page() -> impl Iterator<Item = &'static Asset> {
        ASSETS.iter().filter(|asset| asset.content_type == SCRIPT)
    }

    #[test]
    fn the_page_names_no_file_but_its_own() {
        let index = ASSETS[0].text;
        for line in [ICON, STYLE, APP] {
            assert_eq!(index.matches(line).count(), 1, "{line}");
        }
        assert_eq!(index.matches("href=\"").count(), 3, "icon, style, and the skip link");
        assert_eq!(index.matches("src=").count(), 1);
        for Asset { path, text, .. } in ASSETS {
            let elsewhere = text.replace("http://www.w3.org/2000/svg", "");
            assert!(!elsewhere.contains("://") && !elsewhere.contains("url("), "{path}");
            assert!(!elsewhere.contains(" style=") && !elsewhere.contains(" onclick"), "{path}");
        }
        for Asset { path, text, .. } in scripts_of_the_page() {
            for sink in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("]
            {
                assert!(!text.contains(sink), "{path}: {sink}");
            }
        }
    }

    /// As one script they share their names, and `export` is left out.
    #[test]
    fn a_name_at_the_top_of_a_script_is_that_of_no_other_and_imports_are_lines() {
        let mut names = BTreeSet::new();
        for Asset { path, text, .. } in scripts_of_the_page() {
            for line in text.lines() {
                let line = line.strip_prefix("export ").unwrap_or(line);
                let words: Vec<&str> = line.split([' ', '(', ';']).collect();
                if let ["function" | "const" | "let" | "class", name, ..] = words[..] {
                    assert!(names.insert(name), "{path}: {name}");
                }
                if line.starts_with("import ") {
                    assert!(line.ends_with(".js\";"), "{path}: {line}");
                }
                assert!(!line.contains("export default"), "{path}");
            }
        }
        assert!(names.contains("quantile"));
    }

    #[test]
    fn data_can_not_leave_its_element() {
        let evil = r#"{"name":"</script><script>alert(1)</script><!--"}"#;
        let page = document(evil, "abc");
        assert_eq!(page.matches("<script").count(), 2);
        assert_eq!(page.matches("</script>").count(), 2);
        assert!(!page.contains("alert(1)</script><!--"));
        assert!(page.contains(r#""\u003c/script>\u003cscript>alert(1)\u003c/script>\u003c!--""#));
        assert!(
            !page.contains("src=") && !page.contains("\nimport ") && !page.contains("\nexport ")
        );
    }

    #[test]
    fn a_path_that_is_not_there_is_no_file() {
        assert_eq!(asset("/app.js").map(|asset| asset.content_type), Some(SCRIPT));
        assert_eq!(asset("/../app.js"), None);
        assert_eq!(asset(""), None);
    }
}
