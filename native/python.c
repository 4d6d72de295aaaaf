/*
 * Python inside the process: started once, by the first machine that is opened, and asked for the kernels' addresses.
 *
 * Builds define FXP_PYTHON, FXP_PYTHON_VERSION, FXP_LIBPYTHON and FXP_PATHS.
 */
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <spawn.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>
#include "shim.h"

extern char **environ;

/* "3.11" of an interpreter, or "" when it does not run. */
static void ask_version(const char *python, char *answer, size_t room)
{
    static const char code[] = "import sys; print('%d.%d' % sys.version_info[:2])";
    char *const argv[] = { (char *)python, "-I", "-S", "-c", (char *)code, NULL };
    posix_spawn_file_actions_t actions;
    int ends[2], state;
    size_t have = 0;
    ssize_t got;
    pid_t child;

    answer[0] = 0;
    if (pipe(ends))
        return;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addclose(&actions, ends[0]);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
    posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", 1, 0);
    if (!posix_spawn(&child, python, &actions, NULL, argv, environ)) {
        close(ends[1]);
        while (have + 1 < room && (got = read(ends[0], answer + have, room - 1 - have)) != 0) {
            if (got < 0 && errno != EINTR)
                break;
            have += got > 0 ? (size_t)got : 0;
        }
        answer[have] = 0;
        answer[strcspn(answer, "\n")] = 0;
        while (waitpid(child, &state, 0) < 0 && errno == EINTR)
            ;
    } else {
        close(ends[1]);
    }
    close(ends[0]);
    posix_spawn_file_actions_destroy(&actions);
}

/* An interpreter of this process, the one that the library was built with or FASTEXIT_PYTHON. */
static int32_t start_interpreter(int quiet)
{
    const char *named = getenv("FASTEXIT_PYTHON"), *python = named && *named ? named : FXP_PYTHON;
    const char *cure = python == named ? "set FASTEXIT_PYTHON to the python that fastexit is installed for"
                                       : "set FASTEXIT_PYTHON, or build again: fastexit embed build";
    char version[64];
    PyConfig config;
    PyStatus status;

    if (access(python, X_OK))
        return fail(FX_E_PYTHON, quiet, "no Python at %s: %s", python, cure);
    ask_version(python, version, sizeof version);
    if (strcmp(version, FXP_PYTHON_VERSION))
        return fail(FX_E_PYTHON, quiet, "%s is %s%s, this library needs Python %s: %s", python,
                    *version ? "Python " : "no Python that runs", version, FXP_PYTHON_VERSION, cure);
    /* Isolated: the host's PYTHONHOME and PYTHONPATH are for other programs, and a wrong one would end the process. */
    PyConfig_InitIsolatedConfig(&config);
    config.pathconfig_warnings = 0;
    status = PyConfig_SetBytesString(&config, &config.program_name, python);
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status))
        return fail(FX_E_PYTHON, quiet, "Python does not start from %s: %s", python,
                    status.err_msg ? status.err_msg : "no reason given");
    PyEval_SaveThread();
    return FX_OK;
}

/* The line of the exception that is set; it is cleared. */
static void describe_exception(char *line, size_t room)
{
    PyObject *type, *value, *trace, *text = NULL;
    const char *words = NULL;

    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (value)
        text = PyObject_Str(value);
    if (text)
        words = PyUnicode_AsUTF8(text);
    snprintf(line, room, "%s", words ? words : "unknown error");
    line[strcspn(line, "\n")] = 0;
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    PyErr_Clear();
}

/* The packages that the first call into Python needs: missing ones are an answer here and a traceback there. */
static int32_t import_packages(int quiet)
{
    static const char *const paths[] = { FXP_PATHS NULL };
    static const char *const needed[] = { "_cffi_backend", "fastexit.embed.host", NULL };
    const char *named = getenv("FASTEXIT_PYTHON");
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *path = PySys_GetObject("path");
    int32_t status = FX_OK;
    char why[256];

    for (int i = 0; !(named && *named) && path && paths[i]; i++) {
        PyObject *entry = PyUnicode_DecodeFSDefault(paths[i]);

        if (entry && PySequence_Contains(path, entry) == 0)
            PyList_Insert(path, i, entry);
        Py_XDECREF(entry);
        PyErr_Clear();
    }
    for (int i = 0; needed[i]; i++) {
        PyObject *module = PyImport_ImportModule(needed[i]);

        Py_XDECREF(module);
        if (!module) {
            describe_exception(why, sizeof why);
            status = fail(FX_E_PYTHON, quiet,
                          "fastexit cannot be imported by %s: %s; set FASTEXIT_PYTHON to the python it is installed for",
                          named && *named ? named : FXP_PYTHON, why);
            break;
        }
    }
    PyGILState_Release(gil);
    return status;
}

static int32_t start_once(int quiet)
{
    struct fxp_table fresh = { .size = sizeof fresh, .abi = FX_ABI_VERSION };
    char why[400] = "";
    int32_t status;

    /* Extension modules look for Python's symbols among the global ones, wherever this library was loaded. */
    if (!dlopen(FXP_LIBPYTHON, RTLD_LAZY | RTLD_GLOBAL))
        return fail(FX_E_PYTHON, quiet, "%s cannot be loaded: %s", FXP_LIBPYTHON, dlerror());
    status = Py_IsInitialized() ? FX_OK : start_interpreter(quiet);
    if (status == FX_OK)
        status = import_packages(quiet);
    if (status != FX_OK)
        return status;
    if (cffi_start_python())
        return fail(FX_E_PYTHON, quiet, "Python does not take up libfastexit: build it again: fastexit embed build");
    status = fxp_start(&fresh, why, sizeof why);
    if (status != FX_OK)
        return fail(status, quiet, "%s", why);
    make_crc_table();
    table = fresh;
    return FX_OK;
}

/*
 * Python, kernels and all, once.
 *
 * No lock is held while a machine is made, and here nobody waits with the GIL, which the thread that starts needs: a
 * Python host may hold it here, and a machine may be closed by a finalizer that Python runs inside any of its calls.
 */
static int32_t start(int quiet)
{
    static pthread_mutex_t starting = PTHREAD_MUTEX_INITIALIZER;
    static int started;   /* atomic */
    static pid_t starter; /* atomic; the process whose interpreter is ours, 0: the host's own */
    pid_t owner = __atomic_load_n(&starter, __ATOMIC_RELAXED);
    PyThreadState *kept = NULL;
    int32_t status = FX_OK;

    if (owner && owner != getpid())
        return fail(FX_E_PYTHON, quiet, "Python has not survived fork: fork before the first machine is opened");
    if (__atomic_load_n(&started, __ATOMIC_ACQUIRE))
        return FX_OK;
    if (Py_IsInitialized() && PyGILState_GetThisThreadState() && PyGILState_Check())
        kept = PyEval_SaveThread();
    pthread_mutex_lock(&starting);
    if (!started) {
        if (!Py_IsInitialized())
            __atomic_store_n(&starter, getpid(), __ATOMIC_RELAXED);
        status = start_once(quiet);
        __atomic_store_n(&started, status == FX_OK, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&starting);
    if (kept)
        PyEval_RestoreThread(kept);
    return status;
}
