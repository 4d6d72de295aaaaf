//! Links libfastexit of the folder that FASTEXIT_DIR names, and finds it again at run time.
fn main() {
    let folder = std::env::var("FASTEXIT_DIR").expect("FASTEXIT_DIR: the folder of \"fastexit embed build -o\"");
    println!("cargo:rerun-if-env-changed=FASTEXIT_DIR");
    println!("cargo:rustc-link-search=native={folder}");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
}
